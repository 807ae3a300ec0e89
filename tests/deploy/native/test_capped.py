"""A ReLU6 with a limit for each channel, on int8 kernels and in a file."""

import pytest
import torch

import qtool
from qtool.deploy.native import IN_FLOAT, INT8, SIMULATED, Target, convert, supported_backends
from qtool.deploy.native.files import from_file, to_file
from qtool.deploy.parity import parity
from qtool.graph.capped import CappedReLU6
from qtool.graph.edit import replace_layers
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.quantizers.prepare import quantize_graph

LIMIT = torch.tensor([0.5, 1.0, 2.0, 6.0, 9.0, 0.25, 30.0, 3.0]).reshape(8, 1, 1)


def quantized(net, batches, **config):
    folded = fold_batch_norms(trace(net, batches[0]))
    graph = replace_layers(folded.traced, {"relu1": CappedReLU6(LIMIT), "relu2": CappedReLU6(LIMIT.flip(0))})
    config = qtool.QuantizeConfig(mode="asym_u", mode_weights="sym", **config)
    return quantize_graph(graph, qtool.calibrate(graph, batches), specs_for(graph, config))


@pytest.mark.parametrize("backend", supported_backends())
def test_kernels_give_the_simulations_integers(backend, chain_net, tiny_batches, tmp_path):
    model = quantized(chain_net, tiny_batches, per_channel_weights=True)
    native = convert(model, Target.here(backend))
    x = torch.cat(tiny_batches) * 2
    for name, layer in parity(model, native, x).items():
        assert layer.alone.largest <= 1 and layer.alone.equal > 0.99, (name, layer)
    assert {native.layers[name].runs for name in ("conv1", "depthwise", "project")} == {INT8}
    path = tmp_path / "native.pt"
    path.write_bytes(to_file(native, tiny_batches[0]))
    assert torch.equal(from_file(path)(x), native(x))


@pytest.mark.parametrize(
    "overrides", [{"conv1": {"bits_activations": 0}}, {"conv1|depthwise": {"bits_weights": 0}}]
)
def test_what_has_no_kernel_with_such_ends_stays_right(overrides, chain_net, tiny_batches):
    model = quantized(chain_net, tiny_batches, overrides=overrides)
    native = convert(model)
    for name, layer in parity(model, native, tiny_batches[0] * 2).items():
        assert layer.alone.largest <= 1, (name, layer)
    if "conv1" in overrides:
        own = native.layers["relu1"]
        assert own.runs == IN_FLOAT and "ends elsewhere in each channel" in own.why
    else:
        assert native.layers["conv1"].runs == SIMULATED
