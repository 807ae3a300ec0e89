"""GPTQ on networks: every layer no worse, the network better, the same for the same seed."""

import itertools

import pytest
import torch
from torch import nn

from qtool.algorithms.gptq import GptqSettings, choose_integers, gptq
from qtool.algorithms.rounding.problem import TARGETS, Problem, Sampling, pairs_of_rows, quadratic_of
from qtool.algorithms.store import MemoryStore
from qtool.quantizers.lockstep import Lockstep, integer_layers

MODES = [("asym_u", False), ("asym_s", True), ("sym", False), ("sym_restr", True)]


def _run(planned_w4, net, batches, settings=None, layers=None, store=None, progress=None, **config):
    folded, plan = planned_w4(net, batches, **config)
    names = integer_layers(folded.traced, plan) if layers is None else layers
    found = gptq(
        folded.traced,
        folded,
        plan,
        batches,
        layers=names,
        settings=settings or GptqSettings(damping=0.01),
        store=store,
        progress=progress,
    )
    return (folded, plan), found


@pytest.mark.parametrize(("mode", "per_channel"), MODES)
def test_logits_come_closer_to_the_float_network(
    tiny_net, tiny_batches, planned_w4, logits_sqnr, mode, per_channel
):
    config = {"mode": mode, "per_channel_weights": per_channel}
    (folded, plan), (new, new_plan, report) = _run(planned_w4, tiny_net, tiny_batches, **config)
    before = logits_sqnr(tiny_net, folded, plan, tiny_batches)
    assert logits_sqnr(tiny_net, new, new_plan, tiny_batches) > before + 1.5
    assert [change.name for change in report.changed] == ["conv1", "depthwise", "fc"]
    assert all(change.change > 0 and "->" in change.note for change in report.changed)
    for name in ("conv1", "depthwise", "fc"):
        spec, q = plan.layers[name].weight.spec, new_plan.layers[name].weight_q
        assert q.dtype == plan.layers[name].weight_q.dtype
        assert spec.quant_min <= int(q.min()) and int(q.max()) <= spec.quant_max


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [False, True])
def test_no_channel_of_any_layer_gets_worse(tiny_net, tiny_batches, planned_w4, target, bias):
    folded, plan = planned_w4(tiny_net, tiny_batches, per_channel_weights=True)
    lockstep = Lockstep(folded.traced, folded, plan, tiny_batches)
    better = 0
    for moment in lockstep.moments():
        module = folded.traced.get_submodule(moment.name)
        problem = Problem.of(moment, module, bias)
        rows = pairs_of_rows(moment, module, Sampling(100, target, bias, 0))
        form = quadratic_of(problem, rows, target)
        choice = choose_integers(problem, form, GptqSettings(target=target, bias=bias, damping=0.01))
        before = form.losses(problem.values(problem.given))
        steps = 1.0 if choice.scale is None else choice.scale / problem.grid.scale
        after = form.losses(problem.values(choice.centered) * steps)
        assert bool((after <= before).all())
        assert choice.after <= choice.before
        better += float(after.sum()) < 0.95 * float(before.sum())
    assert better >= 2


def test_the_reported_loss_is_that_of_the_layer(tiny_net, tiny_batches, planned_w4):
    """All rows are looked at, so that the loss is that of the whole output."""
    settings = GptqSettings(rows=10**6)
    (folded, plan), (new, new_plan, report) = _run(planned_w4, tiny_net, tiny_batches, settings, ["conv1"])
    losses = []
    for network, its_plan in ((folded, plan), (new, new_plan)):
        lockstep = Lockstep(folded.traced, network, its_plan, tiny_batches)
        moment = next(lockstep.moments())
        module = network.traced.get_submodule("conv1")
        problem = Problem.of(moment, module, follows=False)
        values = problem.values(problem.given).float().reshape(module.weight.shape)
        errors = signal = 0.0
        for x, x_hat in moment.pairs():
            wanted = moment.module(x)
            errors += float(
                (wanted - nn.functional.conv2d(x_hat, values, module.bias, padding=1)).square().sum()
            )
            signal += float(wanted.square().sum())
        losses.append(errors / signal)
    before, after = (float(part) for part in report.changed[0].note[5:].split(" of the")[0].split(" -> "))
    assert losses == [pytest.approx(before, rel=0.01), pytest.approx(after, rel=0.01)]


def test_a_grouped_convolution_is_solved_as_its_groups_would_be():
    """Two groups of one convolution against two convolutions of their own."""
    torch.manual_seed(0)
    from qtool.algorithms.rounding.grid import RowGrid
    from qtool.algorithms.rounding.quadratic import Sums

    x = torch.randn(2, 200, 9) + torch.randn(2, 200, 1)
    weight = torch.randn(2, 4, 9).double()
    y = x @ weight.float().mT

    def solve(groups):
        w = weight[groups]
        scale = w.abs().amax(dim=2, keepdim=True) / 7
        grid = RowGrid(scale, torch.full_like(scale, -8.0), torch.full_like(scale, 7.0))
        sums = Sums(*w.shape)
        sums.add(x[groups], y[groups])
        settings = GptqSettings(search_scales=False)
        problem = Problem("conv", None, len(w), grid, w, grid.nearest(w), torch.zeros(w.shape[:2]), False)
        return choose_integers(problem, sums.quadratic(centered=False), settings).centered

    together = solve(slice(0, 2))
    assert torch.equal(together, torch.cat([solve(slice(0, 1)), solve(slice(1, 2))]))
    assert not torch.equal(together, (weight / weight.abs().amax(2, keepdim=True) * 7).round())


def _losses(report):
    """What layers lost of their outputs' power, before and after."""
    shares = [change.note[5:].split(" of the")[0].split(" -> ") for change in report.changed]
    return [[float(part) for part in share] for share in shares]


def test_scales_that_are_searched_lose_less(tiny_net, tiny_batches, planned_w4):
    """Ranges are half as wide again as the weights, so finer steps lose less."""
    config = {"per_channel_weights": True, "weight_range_factors": [1.5, 1.5]}
    after = []
    for searched in (False, True):
        settings = GptqSettings(search_scales=searched)
        (_, plan), (_, new, report) = _run(planned_w4, tiny_net, tiny_batches, settings, ["conv1"], **config)
        after.append(_losses(report)[0][1])
        given, grid = plan.layers["conv1"].weight, new.layers["conv1"].weight
        ratios = grid.scale / given.scale
        assert (grid.spec, bool((grid.zero_point == given.zero_point).all())) == (given.spec, True)
        assert bool((ratios < 0.95).all()) is searched
        assert bool((ratios > 0.69).all())
        assert (" scales times 0.7" in report.changed[0].note) is searched
    assert after[1] < 0.7 * after[0]


def test_a_weight_with_one_grid_keeps_it(tiny_net, tiny_batches, planned_w4):
    (_, plan), (_, new, _) = _run(planned_w4, tiny_net, tiny_batches)
    for name in ("conv1", "depthwise", "fc"):
        assert new.layers[name].weight is plan.layers[name].weight


def test_approximated_scales_stay_so(tiny_net, tiny_batches, planned_w4):
    """All scales that are found are multipliers of as many bits as those in front of them."""
    config = {"per_channel_weights": True, "scale_approx_bits": 8, "scale_approx_everywhere": True}
    (_, plan), (_, new, _) = _run(planned_w4, tiny_net, tiny_batches, **config)
    scale = new.layers["conv1"].weight.scale
    assert not torch.equal(scale, plan.layers["conv1"].weight.scale)
    mantissa, _ = torch.frexp(1 / scale.double())
    assert torch.allclose(mantissa * 2**8, (mantissa * 2**8).round(), atol=1e-4)


def test_more_sweeps_give_no_larger_loss(tiny_net, tiny_batches, planned_w4):
    losses = []
    for sweeps in (0, 1, 20):
        settings = GptqSettings(sweeps=sweeps, damping=1e-6)
        _, (_, _, report) = _run(planned_w4, tiny_net, tiny_batches, settings, ["conv1"])
        losses.append(float(report.changed[0].note.split("-> ")[1].split()[0]))
    assert losses == sorted(losses, reverse=True)


def test_strong_damping_leaves_the_nearest(tiny_net, tiny_batches, planned_w4):
    settings = GptqSettings(damping=1e9)
    (_, plan), (_, new_plan, report) = _run(planned_w4, tiny_net, tiny_batches, settings)
    for name in ("conv1", "depthwise", "fc"):
        assert torch.equal(plan.layers[name].weight_q, new_plan.layers[name].weight_q)
    assert [change.change for change in report.changed] == [0, 0, 0]


def test_inputs_that_are_always_zero_keep_the_nearest(planned_w4, logits_sqnr):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 6))
    batches = [torch.randn(20, 12) * (torch.arange(12) % 3 > 0)]
    (_, plan), (_, new_plan, _) = _run(planned_w4, net, batches)
    before, after = (p.layers["0"].weight_q for p in (plan, new_plan))
    assert torch.equal(before[:, ::3], after[:, ::3])
    assert not torch.equal(before, after)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(tiny_net, tiny_batches, planned_w4):
    plans = [
        _run(planned_w4, tiny_net, tiny_batches, GptqSettings(rows=40, seed=seed))[1][1] for seed in (1, 1, 2)
    ]
    first, again, other = ([p.layers[n].weight_q for n in ("conv1", "fc")] for p in plans)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_only_the_named_layers_change_and_what_was_given_stays(tiny_net, tiny_batches, planned_w4):
    (folded, plan), (new, new_plan, _) = _run(planned_w4, tiny_net, tiny_batches, layers=["depthwise"])
    fresh, fresh_plan = planned_w4(tiny_net, tiny_batches)
    for name in ("conv1", "depthwise", "fc"):
        assert torch.equal(plan.layers[name].weight_q, fresh_plan.layers[name].weight_q)
        same = torch.equal(plan.layers[name].weight_q, new_plan.layers[name].weight_q)
        assert same == (name != "depthwise")
        bias = [f.traced.get_submodule(name).bias for f in (fresh, folded, new)]
        assert torch.equal(bias[0], bias[1])
        assert torch.equal(bias[1], bias[2]) == (name != "depthwise")


class _StopAfter(MemoryStore):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def put(self, key, tensors):
        super().put(key, tensors)
        self.layers -= 1
        if self.layers == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("layers", [1, 2])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(tiny_net, tiny_batches, planned_w4, layers):
    store = _StopAfter(layers)
    with pytest.raises(KeyboardInterrupt):
        _run(planned_w4, tiny_net, tiny_batches, store=store)
    seen = []
    _, (_, resumed, report) = _run(planned_w4, tiny_net, tiny_batches, store=store, progress=seen.append)
    _, (_, whole, expected) = _run(planned_w4, tiny_net, tiny_batches)
    assert report == expected
    for name in ("conv1", "depthwise", "fc"):
        assert torch.equal(resumed.layers[name].weight_q, whole.layers[name].weight_q)
        assert torch.equal(resumed.layers[name].bias_q, whole.layers[name].bias_q)
    # Layers from the store say nothing of how long the rest takes.
    assert [p.number for p in seen] == [1, 2, 3]
    assert seen[layers].seconds_left is None


def test_progress_names_every_layer_and_estimates_the_rest(tiny_net, tiny_batches, planned_w4):
    seen = []
    _run(planned_w4, tiny_net, tiny_batches, progress=seen.append)
    assert [(p.name, p.number, p.of) for p in seen] == [("conv1", 1, 3), ("depthwise", 2, 3), ("fc", 3, 3)]
    assert seen[0].seconds_left is None and seen[1].seconds_left > 0
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(seen))


def test_what_cannot_be_rounded_so_is_left_with_the_reason(planned_w4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(), nn.Linear(100, 4))
    settings = GptqSettings(max_inputs=50)
    (_, plan), (_, new_plan, report) = _run(planned_w4, net, [torch.randn(4, 3, 4, 4)], settings)
    assert report.changed == ()
    assert report.left == {
        "0": "a transposed convolution, which is no matrix product of its inputs",
        "2": "100 inputs; at most 50 are taken",
    }
    assert plan.layers == new_plan.layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "both"}, "target must be one of blended, asymmetric, symmetric, found 'both'"),
        ({"damping": 0.0}, "damping must be above 0, found 0.0"),
        ({"sweeps": -1}, "sweeps must be at least 0, found -1"),
        ({"rows": 0}, "rows must be at least 1, found 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GptqSettings(**settings)
