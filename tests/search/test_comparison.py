"""A float network beside its quantized version, against the same found layer by layer by hand."""

import pytest
import torch

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.numerics.metrics import sqnr_db
from qtool.search.comparison import Comparison, flips


@pytest.fixture
def compared(tiny_net, tiny_batches):
    """The comparison of tiny_net at some settings, with its float and quantized networks."""

    def compare(**settings: object):
        traced = trace(tiny_net, tiny_batches[0])
        stats = qtool.calibrate(traced, tiny_batches)
        model = qtool.quantize(traced, stats, QuantizeConfig(**{"mode": "asym_u", **settings}))
        comparison = Comparison(fold_batch_norms(traced), model)
        logits = [comparison.add(batch) for batch in tiny_batches]
        return {one.layer: one for one in comparison.layers()}, model, logits

    return compare


def test_cumulative_noise_is_that_of_the_outputs_in_the_network(compared, tiny_net, tiny_batches):
    found, model, _ = compared(bits_activations=5)
    x = torch.cat(tiny_batches)
    kept: dict[str, torch.Tensor] = {}
    handles = [tiny_net.relu1.register_forward_hook(lambda _m, _a, y: kept.update(relu1=y.detach()))]
    expected = tiny_net(x).detach()
    handles[0].remove()
    codes = model.integers(x)
    for layer, value in (("conv1", kept["relu1"]), ("fc", expected)):
        output = model.plan.layers[layer].output
        x_hat = (codes[layer] - output.zero_point) * output.scale
        assert found[layer].sqnr_db == pytest.approx(sqnr_db(value, x_hat), abs=1e-3)


def test_alone_a_layer_has_only_its_own_noise(compared):
    found, _, _ = compared(bits_activations=4)
    assert found["conv1"].local_sqnr_db == pytest.approx(found["conv1"].sqnr_db, abs=1e-6)
    assert found["fc"].local_sqnr_db > found["fc"].sqnr_db + 0.5


def test_a_layer_in_float_passes_the_noise_on_and_adds_none(compared):
    found, _, _ = compared(no_quant_layers=("fc",), bits_activations=4)
    assert found["fc"].kind == "float" and found["fc"].local_sqnr_db is None and found["fc"].codes is None
    assert 5 < found["fc"].sqnr_db < 60


def test_each_bit_is_worth_six_decibels_alone(compared):
    low, _, _ = compared(bits_activations=6, bits_weights=0)
    high, _, _ = compared(bits_activations=8, bits_weights=0)
    assert high["pool"].local_sqnr_db - low["pool"].local_sqnr_db > 8


def test_codes_are_of_the_layer_and_its_activation(compared, tiny_batches):
    found, model, _ = compared(mode="sym", bits_activations=8)
    codes = model.integers(torch.cat(tiny_batches))["conv1"]
    use = found["conv1"].codes
    assert use.dead == 128  # ReLU on a signed grid
    assert use.unused == 128 - len(codes.unique())
    assert use.levels == 256 and use.saturated == 0.0


def test_clipping_saturates(compared):
    plain, _, _ = compared()
    clipped, _, _ = compared(overrides={"conv1": {"output_range": (0.0, 1.0)}})
    assert plain["conv1"].codes.saturated == 0 < clipped["conv1"].codes.saturated < 1


def test_the_logits_are_those_of_the_networks(compared, tiny_net, tiny_batches):
    _, model, logits = compared()
    for (expected, found), batch in zip(logits, tiny_batches, strict=True):
        assert torch.allclose(expected, tiny_net(batch), atol=1e-4) and torch.equal(found, model(batch))


def test_weights_are_compared_too(compared):
    found, _, _ = compared(bits_weights=8)
    coarse, _, _ = compared(bits_weights=4)
    assert found["fc"].weight_steps < 0.5
    assert 20 < found["fc"].weight_sqnr_db - coarse["fc"].weight_sqnr_db < 28  # 4 bits, 24 dB


def test_weights_only_have_no_codes(compared):
    found, _, _ = compared(bits_activations=0, bits_weights=4)
    assert found["fc"].codes is None and found["fc"].output_bits is None and found["fc"].local_sqnr_db < 40


def test_another_network_and_a_dynamic_one_are_refused(tiny_net, chain_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    model = qtool.quantize(traced, qtool.calibrate(traced, tiny_batches), QuantizeConfig())
    with pytest.raises(ValueError, match="not of the same network"):
        Comparison(fold_batch_norms(trace(chain_net, tiny_batches[0])), model)
    dynamic = qtool.quantize(traced, None, QuantizeConfig(dynamic=True))
    with pytest.raises(ValueError, match="dynamic"):
        Comparison(fold_batch_norms(traced), dynamic)


def test_flips_have_the_margins_of_both_networks():
    expected = torch.tensor([[1.0, 3.0, 0.0], [2.0, 1.0, 0.0]])
    found = torch.tensor([[2.5, 2.0, 0.0], [2.0, 1.5, 0.0]])
    (flip,) = flips(expected, found, torch.tensor([1, 0]), first=10)
    assert (flip.image, flip.label) == (10, 1)
    assert (flip.float_prediction, flip.quantized_prediction) == (1, 0)
    assert (flip.float_margin, flip.quantized_margin) == (2.0, 0.5)
