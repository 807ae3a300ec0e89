"""Steps of weights that leave room for the bias in the accumulator."""

import pytest
import torch

from qtool.config import QuantizeConfig
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.pipeline import steps
from qtool.quantizers.adjust import adjusted
from qtool.quantizers.plan import plan_model
from qtool.quantizers.plan.derived import with_room
from qtool.quantizers.prepare import build


def _planned(net, batches, **settings):
    traced = trace(net, batches[0])
    folded = fold_batch_norms(traced)
    stats = move_stats(steps.calibrate(traced, batches), folded.pairs)
    specs = steps.specs_for(traced, QuantizeConfig(**{"mode": "asym_u", **settings}))
    return folded, plan_model(folded.traced, stats, specs)


@pytest.fixture
def nearly_empty(tiny_net):
    """The third channel of fc has weights of 1e-14, whose steps hold no bias of 2 in 32 bits."""
    tiny_net.fc.weight.data[3] *= 1e-13
    tiny_net.fc.bias.data[3] = 2.0
    return tiny_net


@pytest.mark.parametrize("mode", ["asym_u", "sym", "sym_restr"])
def test_a_channel_with_weights_of_about_zero_keeps_its_bias(mode, nearly_empty, tiny_batches):
    folded, plan = _planned(nearly_empty, tiny_batches, mode=mode, per_channel_weights=True)
    layer = plan.layers["fc"]
    found = build(folded, plan)(tiny_batches[0])[:, 3]
    assert float((found - 2).abs().max()) <= float(layer.output.scale) / 2
    assert int(layer.bias_q.abs().max()) < 2**30 * (1 + 1e-6)
    assert not layer.note


def test_only_the_steps_of_that_channel_are_other_ones(nearly_empty, tiny_batches):
    _, plan = _planned(nearly_empty, tiny_batches, per_channel_weights=True)
    nearly_empty.fc.bias.data[3] = 0.0
    _, plain = _planned(nearly_empty, tiny_batches, per_channel_weights=True)
    layers = [p.layers["fc"] for p in (plan, plain)]
    moved = (layers[0].weight.scale != layers[1].weight.scale).nonzero().flatten()
    assert moved.tolist() == [3]
    others = torch.arange(10) != 3
    assert torch.equal(layers[0].weight_q[others], layers[1].weight_q[others])
    assert torch.equal(layers[0].bias_q[others], layers[1].bias_q[others])


def test_a_layer_with_room_keeps_its_plan(tiny_net, tiny_batches):
    folded, plan = _planned(tiny_net, tiny_batches, per_channel_weights=True)
    module, layer = folded.traced.get_submodule("fc"), plan.layers["fc"]
    for bias in (None, module.bias, torch.zeros(10)):
        assert with_room(layer, plan.layers["conv1"].output, bias, module) is layer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_channel_weights": True, "bits_accum": 16},
        {"per_channel_weights": True, "scale_approx_bits": 8},
    ],
    ids=["per tensor", "a narrow accumulator", "approximated scales"],
)
def test_grids_that_wider_steps_would_show_in_stay(settings, tiny_net, tiny_batches):
    folded, plan = _planned(tiny_net, tiny_batches, **settings)
    module, layer = folded.traced.get_submodule("fc"), plan.layers["fc"]
    bias = torch.full((10,), 1e9)
    assert with_room(layer, plan.layers["conv1"].output, bias, module) is layer


def test_other_grids_in_front_leave_room_too(nearly_empty, tiny_batches):
    folded, plan = _planned(nearly_empty, tiny_batches, per_channel_weights=True)
    nearly_empty.fc.bias.data[3] = 0.0
    _, plain = _planned(nearly_empty, tiny_batches, per_channel_weights=True)
    # The raw grid of the weight, as a search of grids gives it.
    found = adjusted(folded.traced, plan, {"fc": plain.layers["fc"].weight}).layers["fc"]
    assert torch.equal(found.weight.scale, plan.layers["fc"].weight.scale)
    assert torch.equal(found.bias_q, plan.layers["fc"].bias_q)
