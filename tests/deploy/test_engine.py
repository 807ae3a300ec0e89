import pytest
import torch
from torch import nn

import qtool
from qtool.deploy import engine as engines
from qtool.deploy.engine import AUTO, INT8, SIMULATE, choose_engine, evaluator
from qtool.deploy.native import NativeModel, kernels
from qtool.deploy.parity import Difference, parity
from qtool.errors import ConfigError

SYMMETRIC = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True}


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (6, 6), (4, 4), (4, 8), (8, 3), (2, 2)])
@pytest.mark.parametrize("mode", ["sym", "asym_u"])
def test_grids_of_8_bits_and_below_run_on_int8_kernels(weights, activations, mode, quantized, kernel_batch):
    model = quantized(mode=mode, mode_weights="sym", bits_weights=weights, bits_activations=activations)
    chosen = choose_engine(model, INT8)
    assert chosen.name == INT8 and isinstance(chosen.network, NativeModel)
    assert chosen.work > 0.9
    for name, layer in parity(model, chosen.network, kernel_batch).items():
        assert layer.alone.largest <= 1 and layer.alone.equal > 0.98, name


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("behind", [nn.ReLU, nn.Identity])
def test_convolutions_give_the_simulations_integers_to_the_last_one(behind, bits):
    """Of so many values, some lie next to a tie: with another order of operations they go the other way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 128, 1), behind(), nn.Conv2d(128, 128, 3, groups=128), behind())
    x = torch.randn(16, 32, 56, 56)
    stats = qtool.calibrate(net.eval(), [x[:2]])
    config = qtool.QuantizeConfig(**SYMMETRIC, bits_weights=bits, bits_activations=bits)
    model = qtool.quantize(net, stats, config)
    found = parity(model, choose_engine(model, INT8).network, x)
    assert len(found) == 2 and {layer.in_network for layer in found.values()} == {Difference(0, 1.0)}


def test_the_engine_gives_the_simulations_logits(quantized, kernel_batch):
    model = quantized(**SYMMETRIC, bits_weights=4, bits_activations=4)
    a, b = model(kernel_batch), evaluator(model, INT8)(kernel_batch)
    step = float(model.plan.layers["fc2"].output.scale)
    assert float((a - b).abs().max()) <= 2.01 * step
    assert evaluator(model, SIMULATE) is model


def test_weights_in_float_leave_the_work_in_float(quantized, kernel_batch):
    model = quantized(bits_weights=0, mode="asym_u")
    chosen = choose_engine(model, INT8)
    assert 0 <= chosen.work < 0.5
    torch.testing.assert_close(chosen.network(kernel_batch), model(kernel_batch))
    assert choose_engine(model, AUTO).name == SIMULATE


def test_auto_takes_int8_kernels_and_says_why(quantized, kernel_batch):
    chosen = choose_engine(quantized(**SYMMETRIC), AUTO, kernel_batch)
    assert chosen.name == INT8 and "% of the multiply-accumulates, within the tolerance" in chosen.why


def test_auto_simulates_what_kernels_cannot_do(quantized):
    model = quantized(bits_activations=12)
    chosen = choose_engine(model, AUTO)
    assert chosen.network is model and chosen.name == SIMULATE
    assert "its output has 12 bits" in chosen.why
    with pytest.raises(ConfigError, match="--engine int8: no layer would run"):
        choose_engine(model, INT8)


def test_auto_simulates_when_kernels_would_do_little(kernel_net, kernel_stats):
    config = qtool.QuantizeConfig(
        **SYMMETRIC,
        overrides={"conv1": {"bits_activations": 12}, "few_groups": {"bits_activations": 12}},
    )
    chosen = choose_engine(qtool.quantize(kernel_net, kernel_stats, config), AUTO)
    assert chosen.name == SIMULATE and chosen.native is not None
    assert "of the multiply-accumulates only" in chosen.why and 0 < chosen.work < 0.5


def test_auto_simulates_when_a_layer_is_off(quantized, kernel_batch, monkeypatch):
    model = quantized(**SYMMETRIC)
    convert = engines.convert

    def wrong(*args, **kwargs):
        native = convert(*args, **kwargs)
        right = native.network.get_submodule("squeeze")
        right.output = type(right.output)(right.output.scale, right.output.zero_point + 9, right.output.high)
        return native

    monkeypatch.setattr(engines, "convert", wrong)
    chosen = choose_engine(model, AUTO, kernel_batch)
    assert chosen.name == SIMULATE and chosen.network is model
    assert chosen.why.startswith("layer 'squeeze' would differ by up to ")


def test_dynamic_grids_are_simulated(tiny_net, tiny_batches):
    config = qtool.QuantizeConfig(dynamic=True)
    model = qtool.quantize(tiny_net, None, config, example=tiny_batches[0])
    assert choose_engine(model, AUTO).name == SIMULATE
    with pytest.raises(ConfigError, match="--engine int8: int8 kernels need grids that are known beforehand"):
        choose_engine(model, INT8)


def test_an_unknown_engine_is_refused(quantized):
    with pytest.raises(ValueError, match="engine must be one of simulate, int8, auto, found 'fast'"):
        choose_engine(quantized(), "fast")


def test_a_build_without_int8_kernels_simulates(quantized, monkeypatch):
    monkeypatch.setattr(engines, "supported_backends", list)
    assert "has no int8 kernels" in choose_engine(quantized(), AUTO).why


def test_parts_of_a_batch_are_compared_as_the_whole():
    a, b = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 2, 5, 3, 5, 6])
    parts = [(4 / 6, Difference.of(a[:4], b[:4])), (2 / 6, Difference.of(a[4:], b[4:]))]
    whole = Difference.of(a, b)
    assert Difference.over(parts) == Difference(whole.largest, pytest.approx(whole.equal))


def test_large_batches_are_compared_in_parts(quantized, kernel_batch, monkeypatch):
    model = quantized(**SYMMETRIC)
    native = choose_engine(model, INT8).network
    whole = parity(model, native, kernel_batch)
    monkeypatch.setattr("qtool.deploy.parity.CHUNK", 1)
    in_parts = parity(model, native, kernel_batch)
    assert whole.keys() == in_parts.keys()
    for name, layer in whole.items():
        assert in_parts[name].alone.equal == pytest.approx(layer.alone.equal), name
        assert in_parts[name].in_network.largest == layer.in_network.largest, name


def test_a_network_without_matrices_is_all_on_kernels():
    net, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 3, 8, 8)
    model = qtool.quantize(net, qtool.calibrate(net, [x]), qtool.QuantizeConfig(mode="asym_u"))
    chosen = choose_engine(model, AUTO)
    assert chosen.work == 1.0 and chosen.name == INT8


def test_a_linear_layer_with_a_zero_point_is_not_put_on_the_kernel_without_a_fast_form_for_it(monkeypatch):
    backends = []
    made = kernels.engine
    monkeypatch.setattr(kernels, "engine", lambda backend: backends.append(backend) or made(backend))
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    model = qtool.quantize(net, qtool.calibrate(net, [x]), qtool.QuantizeConfig(**SYMMETRIC))
    target = choose_engine(model, INT8).native.target
    # The image has a zero point, what a ReLU gives has none.
    assert backends == [target.backend, "onednn" if target.as_simulated else target.backend]
