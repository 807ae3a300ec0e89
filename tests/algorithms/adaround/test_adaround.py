"""AdaRound: what is learned is decided, never worse, and the same for the same seed."""

import itertools

import pytest
import torch
from torch import nn

from qtool.algorithms.adaround import AdaRoundSettings, adaround, learn_integers
from qtool.algorithms.adaround.learn import Cached, outputs
from qtool.algorithms.rounding.grid import RowGrid
from qtool.algorithms.rounding.problem import Problem
from qtool.algorithms.store import MemoryStore
from qtool.quantizers.lockstep import integer_layers
from qtool.quantizers.plan import LayerPlan

FAST = AdaRoundSettings(iterations=150, rows=400, batch=64)


def _problem(activation, channels=3, inputs=8, seed=0, follows=False):
    """A layer with four levels for each weight, and correlated rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, channels, inputs, generator=generator).double()
    scale = torch.full((1, channels, 1), 0.8, dtype=torch.float64)
    grid = RowGrid(scale, torch.full_like(scale, -2.0), torch.full_like(scale, 1.0))
    x = torch.randn(1, 200, inputs, generator=generator) + 2 * torch.randn(1, 200, 1, generator=generator)
    bias = torch.randn(1, channels, generator=generator).double()
    plan = LayerPlan("integer", "linear", activation=activation)
    cached = Cached(x, outputs(x, weight.float(), bias.float()))
    return Problem("fc", plan, 1, grid, weight, grid.nearest(weight), bias, follows), cached


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("start", ["gptq", "nearest"])
@pytest.mark.parametrize("follows", [False, True])
def test_no_channel_gets_worse_behind_its_activation(activation, start, follows):
    problem, cached = _problem(activation, channels=12, follows=follows)
    settings = AdaRoundSettings(iterations=150, batch=64, start=start)
    choice = learn_integers(problem, cached, settings, seed=0)
    before = cached.losses(problem.values(problem.given), problem.bias, activation)
    bias = problem.bias if choice.bias is None else choice.bias
    after = cached.losses(problem.values(choice.centered), bias, activation)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.7 * float(before.sum())
    assert (choice.bias is not None) == follows
    assert bool(((choice.centered >= -2) & (choice.centered <= 1)).all())
    assert torch.equal(choice.centered, choice.centered.round())


def test_eight_weights_come_close_to_the_best_of_all_roundings():
    """Behind a ReLU, where no quadratic form knows the loss."""
    found = best = nearest = 0.0
    for seed in range(6):
        problem, cached = _problem("relu", channels=1, seed=seed)
        choice = learn_integers(problem, cached, AdaRoundSettings(iterations=300, batch=64), seed=0)
        every = torch.tensor(list(itertools.product(range(-2, 2), repeat=8)), dtype=torch.float64)
        many = cached.x[0] @ (every * 0.8).float().T + problem.bias.float()
        best += float((many.relu() - cached.y[0].relu()).square().mean(dim=0).min())
        found += float(cached.losses(problem.values(choice.centered), problem.bias, "relu"))
        nearest += float(cached.losses(problem.values(problem.given), problem.bias, "relu"))
    assert best <= found + 1e-5  # of float32
    assert found - best < 0.15 * (nearest - best)


def test_the_loss_behind_a_relu_is_what_is_learned():
    """Where the outputs are negative all the same, no weight matters, and all loss is where they are not."""
    problem, cached = _problem("relu", channels=6)
    choice = learn_integers(problem, cached, FAST, seed=0)
    plain, _ = _problem(None, channels=6)
    other = learn_integers(plain, cached, FAST, seed=0)
    behind = [
        float(cached.losses(problem.values(c.centered), problem.bias, "relu").sum()) for c in (choice, other)
    ]
    assert behind[0] < behind[1]


def test_integers_are_decided_in_the_end():
    problem, cached = _problem("relu", channels=12)
    choice = learn_integers(problem, cached, AdaRoundSettings(iterations=500, batch=64), seed=0)
    assert choice.numbers[", {:.2f} % undecided before hardening"] < 1


def _run(planned_w4, net, batches, settings=FAST, store=None, **config):
    folded, plan = planned_w4(net, batches, **config)
    names = integer_layers(folded.traced, plan)
    return (folded, plan), adaround(
        folded.traced, folded, plan, batches, layers=names, settings=settings, store=store
    )


@pytest.mark.parametrize(("mode", "per_channel"), [("asym_u", True), ("sym", False)])
def test_logits_come_closer_to_the_float_network(
    tiny_net, tiny_batches, planned_w4, logits_sqnr, mode, per_channel
):
    config = {"mode": mode, "per_channel_weights": per_channel}
    (folded, plan), (new, new_plan, report) = _run(planned_w4, tiny_net, tiny_batches, **config)
    before = logits_sqnr(tiny_net, folded, plan, tiny_batches)
    assert logits_sqnr(tiny_net, new, new_plan, tiny_batches) > before + 1.5
    assert [change.name for change in report.changed] == ["conv1", "depthwise", "fc"]
    assert all("undecided before hardening" in change.note for change in report.changed)


def test_the_same_seed_gives_the_same_bytes(tiny_net, tiny_batches, planned_w4):
    plans = [_run(planned_w4, tiny_net, tiny_batches)[1][1] for _ in range(2)]
    for name in ("conv1", "depthwise", "fc"):
        assert torch.equal(*(p.layers[name].weight_q for p in plans))
        assert torch.equal(*(p.layers[name].bias_q for p in plans))


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(tiny_net, tiny_batches, planned_w4):
    class StopAfterTwo(MemoryStore):
        def put(self, key, tensors):
            super().put(key, tensors)
            if key == "adaround.depthwise":
                raise KeyboardInterrupt

    store = StopAfterTwo()
    with pytest.raises(KeyboardInterrupt):
        _run(planned_w4, tiny_net, tiny_batches, store=store)
    _, (_, resumed, report) = _run(planned_w4, tiny_net, tiny_batches, store=store)
    _, (_, whole, expected) = _run(planned_w4, tiny_net, tiny_batches)
    assert report == expected
    for name in ("conv1", "depthwise", "fc"):
        assert torch.equal(resumed.layers[name].weight_q, whole.layers[name].weight_q)
        assert torch.equal(resumed.layers[name].bias_q, whole.layers[name].bias_q)


def test_a_layer_without_bias_keeps_none(planned_w4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    _, (new, new_plan, report) = _run(planned_w4, net, [torch.randn(50, 16)])
    assert len(report.changed) == 2
    assert all(new.traced.get_submodule(name).bias is None for name in ("0", "2"))
    assert all(new_plan.layers[name].bias_q is None for name in ("0", "2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "zero"}, "start must be one of gptq, nearest, found 'zero'"),
        ({"warm_up": 1.0}, "warm_up must be from 0 to below 1, found 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, found 0.0"),
        ({"iterations": 0}, "iterations must be at least 1, found 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaRoundSettings(**settings)
