"""A ReLU6 with a limit for each channel, in every form a layer can take, and in a file."""

import io

import pytest
import torch

import qtool
from qtool.graph.capped import CappedReLU6
from qtool.graph.edit import replace_layers
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.quantizers.adjust import adjusted
from qtool.quantizers.checkpoint import from_checkpoint, to_checkpoint
from qtool.quantizers.limits import OutputClamp, activated
from qtool.quantizers.plan import FAKE, FLOAT, IDENTITY, INTEGER
from qtool.quantizers.prepare import build, quantize_graph

LIMIT = torch.tensor([0.5, 1.0, 2.0, 6.0, 9.0, 0.25, 30.0, 3.0]).reshape(8, 1, 1)
# How conv1 computes, and then relu1, under these settings.
FORMS = {
    "fused": ({"mode": "asym_u", "per_channel_weights": True}, INTEGER, IDENTITY),
    "fused, symmetric": ({}, INTEGER, IDENTITY),
    "multipliers": ({"mode": "asym_u", "scale_approx_bits": 12}, INTEGER, IDENTITY),
    "float convolution": ({"mode": "asym_u", "bits_weights": 0}, FAKE, IDENTITY),
    "on its own": (
        {"mode": "asym_u", "overrides": {"conv1": {"bits_activations": 0}}}, "weights only", FAKE
    ),
    "in float": (
        {"overrides": {"conv1|relu1": {"bits_activations": 0, "bits_weights": 0}}}, FLOAT, FLOAT
    ),
    "dynamic": ({"mode": "asym_u", "dynamic": True}, "dynamic integer", IDENTITY),
    "dynamic, multipliers": (
        {"mode": "asym_u", "dynamic": True, "scale_approx_bits": 12}, "dynamic integer", IDENTITY
    ),
    "dynamic, float convolution": (
        {"mode": "asym_u", "dynamic": True, "bits_weights": 0}, "dynamic fake", IDENTITY
    ),
}  # fmt: skip


def quantized(net, batches, limit, config):
    folded = fold_batch_norms(trace(net, batches[0]))
    graph = folded.traced if limit is None else replace_layers(folded.traced, {"relu1": CappedReLU6(limit)})
    config = qtool.QuantizeConfig(**config)
    stats = None if config.dynamic else qtool.calibrate(graph, batches)
    return quantize_graph(graph, stats, specs_for(graph, config)), graph


def values_read_by_depthwise(model, x):
    """In float, whatever form the quantized network has them in."""
    found = []
    module = model.network.depthwise
    handle = module.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    try:
        model(x)
    finally:
        handle.remove()
    (value,) = found
    if isinstance(value, tuple):  # on a grid that was found at run time
        return value.centered * value.scale
    if model.plan.layers["depthwise"].kind != INTEGER:
        return value
    grids = [model.plan.layers[name].output for name in ("conv1", "relu1")]
    grid = next((g for g in [*grids, *model.plan.layers["depthwise"].inputs] if g is not None), None)
    return value if grid is None else value * grid.scale


@pytest.mark.parametrize("form", FORMS)
def test_every_form_ends_each_channel_at_its_limit(form, chain_net, tiny_batches):
    config, kind, activation = FORMS[form]
    model, graph = quantized(chain_net, tiny_batches, LIMIT, config)
    assert (model.plan.layers["conv1"].kind, model.plan.layers["relu1"].kind) == (kind, activation)
    x = torch.cat(tiny_batches)
    found = values_read_by_depthwise(model, x)
    expected = graph.relu1(graph.conv1(x))
    ends, wanted = found.amax((0, 2, 3)), expected.amax((0, 2, 3))
    step = float(wanted.max()) / 50  # a few steps of 8 bits, as weights are rounded too
    assert float((ends - wanted).abs().max()) < step
    assert int((wanted == LIMIT.flatten()).sum()) >= 3  # limits that are met
    assert float((found - expected).abs().mean()) < 0.05 * float(expected.mean())


@pytest.mark.parametrize("form", FORMS)
def test_a_limit_of_6_everywhere_is_plain_relu6(form, chain_net, tiny_batches):
    config, _, _ = FORMS[form]
    plain, _ = quantized(chain_net, tiny_batches, None, config)
    six, _ = quantized(chain_net, tiny_batches, torch.full((8, 1, 1), 6.0), config)
    assert torch.equal(six(tiny_batches[1]), plain(tiny_batches[1]))


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_into_the_original_architecture_bit_for_bit(form, chain_net, tiny_batches):
    config, _, _ = FORMS[form]
    model, _ = quantized(chain_net, tiny_batches, LIMIT, config)
    file = io.BytesIO()
    torch.save(to_checkpoint(model), file)
    file.seek(0)
    again = from_checkpoint(torch.load(file, weights_only=True), type(chain_net)(), tiny_batches[0])
    assert torch.equal(again(tiny_batches[1]), model(tiny_batches[1]))


def test_other_grids_keep_the_limits(chain_net, tiny_batches):
    model, graph = quantized(chain_net, tiny_batches, LIMIT, {"mode": "asym_u"})
    output = model.plan.layers["conv1"].output
    wider = type(output)(torch.tensor(0.125), output.zero_point, output.spec)
    plan = adjusted(graph, model.plan, outputs={"conv1": wider})
    changed = build(fold_batch_norms(graph), plan)
    clamp = changed.network.conv1.requantize.clamp
    assert clamp.highs.flatten().tolist() == [4.0, 8.0, 16.0, 48.0, 72.0, 2.0, 240.0, 24.0]


def test_the_clamp_of_channels_is_exact_in_place():
    from qtool.numerics.spec import QParams, QuantSpec

    grid = QParams(torch.tensor(0.5), torch.tensor(0.0), QuantSpec.from_mode("asym_u", 4))
    clamp = OutputClamp(grid, "relu6", torch.tensor([1.0, 2.25, 100.0]))
    x = torch.tensor([[-3.0, -3.0, -3.0], [2.0, 4.0, 15.0], [9.0, 9.0, 99.0]])
    assert torch.equal(clamp.apply_(x), torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 15.0], [2.0, 4.0, 15.0]]))
    assert (clamp.low, clamp.high) == (0.0, 15.0)


def test_floats_go_through_the_activation_that_a_layer_computes():
    x = torch.tensor([[-1.0, 3.0], [4.0, 9.0]])
    assert torch.equal(activated(x, None), x)
    assert activated(x, "relu").tolist() == [[0.0, 3.0], [4.0, 9.0]]
    assert activated(x, "relu6").tolist() == [[0.0, 3.0], [4.0, 6.0]]
    assert activated(x, "relu6", torch.tensor([2.0, 8.0])).tolist() == [[0.0, 3.0], [2.0, 8.0]]


def test_a_bias_that_a_correction_made_survives_the_file(chain_net, tiny_batches):
    from qtool.graph.edit import with_parameters

    folded = fold_batch_norms(trace(chain_net, tiny_batches[0]))
    project = with_parameters(folded.traced.project, bias=torch.arange(4.0))
    graph = replace_layers(folded.traced, {"project": project})
    for config in ({"bits_weights": 0}, {}, {"bits_activations": 0}):
        config = qtool.QuantizeConfig(**config)
        model = quantize_graph(graph, qtool.calibrate(graph, tiny_batches), specs_for(graph, config))
        again = from_checkpoint(to_checkpoint(model), type(chain_net)(), tiny_batches[0])
        assert torch.equal(again(tiny_batches[1]), model(tiny_batches[1]))
