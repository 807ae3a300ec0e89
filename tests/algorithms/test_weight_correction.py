"""The mean and the spread of weights, given back in the scale and the bias, or by rounding again."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qtool.algorithms.bias_correction import effective_weight
from qtool.algorithms.weight_correction import (
    PROJECTION,
    WeightCorrectionSettings,
    correct_weights,
    moment_factors,
    requantized,
)
from qtool.numerics.affine import dequantize, qparams_from_range, quantize
from qtool.numerics.spec import QParams, QuantSpec
from qtool.quantizers.prepare import build
from qtool.quantizers.weights import weight_values

REQUANTIZE = WeightCorrectionSettings(form="requantize")


def _weights(seed=0, shape=(6, 4, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) + 0.3 * torch.randn(shape[0], 1, 1, 1, generator=generator)


def _on_grid(weight, bits=3, axis=0):
    spec = QuantSpec(num_bits=bits, axis=axis)
    v = weight.abs().flatten(1).amax(1) if axis == 0 else weight.abs().max()
    return qparams_from_range(-v, v, spec)


def test_factors_of_weights_worked_by_hand():
    weight = torch.tensor([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0], [0.1, -0.1, 0.0]])
    weight_hat = torch.tensor([[2.0, 2.0, 5.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mu, xi = moment_factors(weight, weight_hat)
    assert mu.tolist() == [0.0, 1.0, pytest.approx(0.0, abs=1e-9)]
    # ||(-2, 0, 2)|| / ||(-1, -1, 2)|| = sqrt(8 / 6); channels without a spread keep their scale
    assert xi.tolist() == [pytest.approx((8 / 6) ** 0.5), 1.0, 1.0]


def test_the_projection_worked_by_hand():
    weight = torch.tensor([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 0.0]])
    weight_hat = torch.tensor([[2.0, 2.0, 5.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
    mu, xi = moment_factors(weight, weight_hat, PROJECTION)
    assert mu.tolist() == [0.0, 1.0, 0.0]
    # <(-2, 0, 2), (-2, 0, 2)> / <(-2, 0, 2), (-1, -1, 2)> = 8 / 6; what points the other way keeps its scale
    assert xi.tolist() == [pytest.approx(8 / 6), 1.0, 1.0]


def test_the_error_that_the_projection_leaves_is_orthogonal_to_the_weights():
    weight = _weights()
    weight_hat = dequantize(quantize(weight, _on_grid(weight)), _on_grid(weight))
    mu, xi = moment_factors(weight, weight_hat, PROJECTION)
    moved = xi[:, None] * (weight_hat.double().flatten(1) + mu[:, None])
    centered = weight.double().flatten(1)
    centered = centered - centered.mean(1, keepdim=True)
    error = moved - moved.mean(1, keepdim=True) - centered
    assert ((error * centered).sum(1).abs() < 1e-9).all() and (error.norm(dim=1) > 0.01).all()


def test_the_factor_is_that_of_the_settings(planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=3, per_channel_weights=True)
    settings = WeightCorrectionSettings(factor=PROJECTION)
    _, plan, _ = correct_weights(*case.given, layers=["fc"], settings=settings)
    _, xi = moment_factors(
        case.reference.fc.weight, weight_values(*_grid_and_integers(case.plan, "fc")), PROJECTION
    )
    ratio = plan.layers["fc"].weight.scale.double() / case.plan.layers["fc"].weight.scale.double()
    assert torch.allclose(ratio, xi, rtol=1e-6) and (xi - 1).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": "mean"}, "factor must be one of spread, projection, found 'mean'"),
        (
            {"form": "requantize", "factor": PROJECTION},
            "form requantize has the factor spread, found projection",
        ),
    ],
)
def test_factors_that_are_not_there_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightCorrectionSettings(**settings)


def test_the_factor_gives_the_spread_back():
    weight = _weights()
    weight_hat = dequantize(quantize(weight, _on_grid(weight)), _on_grid(weight))
    mu, xi = moment_factors(weight, weight_hat)
    moved = xi.reshape(-1, 1) * (weight_hat.double().flatten(1) + mu[:, None])
    assert torch.allclose(moved.std(1), weight.double().flatten(1).std(1))
    assert not torch.allclose(weight_hat.flatten(1).std(1), weight.flatten(1).std(1), rtol=1e-3)


def test_rounding_again_worked_by_hand():
    """W = (0.6, 1.4, 3) becomes (1, 1, 3): mean 5/3 for 5/3, spread 0.9978 for 0.9428, so r = 1.0583,
    u = -0.0972, and r W + u = (0.538, 1.384, 3.078), which gives the same integers."""
    grid = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec(num_bits=4))
    assert requantized(torch.tensor([[0.6, 1.4, 3.0]]), grid).tolist() == [[1, 1, 3]]
    # (0.6, 0.6, 0.6, 4) -> (1, 1, 1, 4): r = 3.4 / 3, u = 1.45 - r * 1.75, r W + u = (0.147, ..., 4)
    assert requantized(torch.tensor([[0.6, 0.6, 0.6, 4.0]]), grid).tolist() == [[0, 0, 0, 4]]


@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_rounding_again_brings_the_spread_closer(axis):
    weight = _weights(shape=(6, 16, 3, 3))
    grid = _on_grid(weight, bits=2, axis=axis)
    before, after = quantize(weight, grid), requantized(weight, grid)
    assert int(after.min()) >= -2 and int(after.max()) <= 1
    errors = [
        (dequantize(q.float(), grid).flatten(1).std(1) - weight.flatten(1).std(1)).abs().mean()
        for q in (before, after)
    ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("bits", [0, 8], ids=["weights only", "W3A8"])
def test_per_channel_the_scale_holds_the_factor_and_the_bias_the_mean(bits, planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=3, bits_activations=bits, per_channel_weights=True)
    folded, plan, report = correct_weights(*case.given, layers=case.names)
    assert [change.name for change in report.changed] == ["conv1", "depthwise", "fc"]
    for name in ("conv1", "depthwise", "fc"):
        old, new = case.plan.layers[name], plan.layers[name]
        module = case.reference.get_submodule(name)
        mu, xi = moment_factors(module.weight, weight_values(old.weight, old.weight_q))
        assert torch.allclose(new.weight.scale, (old.weight.scale * xi).float())
        assert torch.equal(new.weight_q, old.weight_q)
        if bits:  # the accumulator's steps follow the scale
            assert torch.allclose(new.accum_scale / old.accum_scale, xi, rtol=1e-6)
    # xi * (W_q + mu), computed in float, has the mean that the new scale and bias give
    x = torch.cat(tiny_batches)
    mu, xi = moment_factors(
        case.reference.conv1.weight, weight_values(*_grid_and_integers(case.plan, "conv1"))
    )
    weight = weight_values(*_grid_and_integers(case.plan, "conv1")).double() + mu.reshape(-1, 1, 1, 1)
    wanted = torch.conv2d(x.double(), weight * xi.reshape(-1, 1, 1, 1), padding=1).mean((0, 2, 3))
    own = effective_weight(plan.layers["conv1"], case.reference.conv1, plan.layers["conv1"].inputs[0])
    moved = (folded.traced.conv1.bias - case.reference.conv1.bias).double()
    found = torch.conv2d(x.double(), own, padding=1).mean((0, 2, 3)) + moved
    assert torch.allclose(found, wanted, atol=1e-6)


def _grid_and_integers(plan, name):
    return plan.layers[name].weight, plan.layers[name].weight_q


def test_per_tensor_the_spread_stays_and_the_bias_holds_the_mean(planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=3)
    folded, plan, report = correct_weights(*case.given, layers=case.names)
    assert plan.layers["fc"].weight is case.plan.layers["fc"].weight
    mu, _ = moment_factors(case.reference.fc.weight, weight_values(*_grid_and_integers(case.plan, "fc")))
    with torch.no_grad():
        x = torch.cat([_input_of_fc(case.reference, x) for x in tiny_batches])
    expected = case.reference.fc.bias + (mu * x.double().sum(1).mean()).float()
    assert torch.allclose(folded.traced.fc.bias, expected, atol=1e-5)
    assert report.changed[-1].note.endswith("the spread stays: one scale for the whole weight")


def _input_of_fc(network, x):
    seen = []
    with network.fc.register_forward_pre_hook(lambda _m, args: seen.append(args[0])):
        network(x)
    return seen[0]


def test_without_images_only_the_scales_change(planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=3, per_channel_weights=True)
    folded, plan, report = correct_weights(*case.given[:3], [], layers=["fc"])
    assert torch.equal(folded.traced.fc.bias, case.reference.fc.bias)
    assert not torch.equal(plan.layers["fc"].weight.scale, case.plan.layers["fc"].weight.scale)
    assert "the bias stays: no images" in report.changed[0].note
    tensor = planned(tiny_net, tiny_batches, bits_weights=3)
    _, plan, report = correct_weights(*tensor.given[:3], [], layers=["fc"])
    assert plan.layers["fc"] is tensor.plan.layers["fc"]
    assert report.left["fc"].startswith(
        "one scale for the whole weight cannot hold a factor for each channel"
    )


def test_rounding_again_changes_integers_and_nothing_else(planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=3)
    _, plan, report = correct_weights(*case.given, layers=["conv1"], settings=REQUANTIZE)
    old, new = case.plan.layers["conv1"], plan.layers["conv1"]
    assert (report.method, report.changed[0].name) == ("weight_correction", "conv1")
    assert torch.equal(new.weight_q, requantized(case.reference.conv1.weight, old.weight))
    assert not torch.equal(new.weight_q, old.weight_q)
    assert new.weight is old.weight and torch.equal(new.bias_q, old.bias_q)
    assert all(plan.layers[n] is case.plan.layers[n] for n in plan.layers if n != "conv1")


def test_the_mean_output_comes_closer_to_the_float_one(relu_chain, planned):
    """At 2 bits the norm of rounded weights is far off."""
    case = planned(*relu_chain, bits_weights=2, bits_activations=0, per_channel_weights=True)
    folded, plan, _ = correct_weights(*case.given, layers=case.names)
    assert case.mean_error(folded, plan) < case.mean_error(case.folded, case.plan)


def test_transposed_convolutions_count_output_channels(planned):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))
    net[0].weight.data = torch.randn(4, 3, 3, 3, generator=generator)
    case = planned(
        net, [torch.rand(2, 4, 5, 5, generator=generator)], bits_weights=2, per_channel_weights=True
    )
    plan = correct_weights(*case.given, layers=["0"])[1]
    module, layer = case.reference.get_submodule("0"), plan.layers["0"]
    weight = effective_weight(layer, module, layer.inputs[0])  # (C_in, C_out / groups, ...)
    for group in range(2):
        for j in range(3):
            rows = [w[2 * group : 2 * group + 2, j] for w in (weight, module.weight.detach().double())]
            assert torch.allclose(rows[0].std(), rows[1].std(), rtol=1e-5)


def test_scales_that_are_short_multipliers_stay_so(planned, tiny_net, tiny_batches):
    settings = {"scale_approx_bits": 4, "scale_approx_everywhere": True, "per_channel_weights": True}
    case = planned(tiny_net, tiny_batches, bits_weights=3, **settings)
    plan = correct_weights(*case.given, layers=["fc"])[1]
    steps, _ = torch.frexp(1 / plan.layers["fc"].weight.scale.double())
    assert torch.allclose(steps * 16, (steps * 16).round(), atol=1e-5)
    exact = planned(tiny_net, tiny_batches, bits_weights=3, per_channel_weights=True, scale_approx_bits=4)
    steps, _ = torch.frexp(
        1 / correct_weights(*exact.given, layers=["fc"])[1].layers["fc"].weight.scale.double()
    )
    assert not torch.allclose(steps * 16, (steps * 16).round(), atol=1e-3)


def test_a_corrected_network_still_builds_and_runs(planned, tiny_net, tiny_batches):
    case = planned(tiny_net, tiny_batches, bits_weights=4, per_channel_weights=True)
    folded, plan, _ = correct_weights(*case.given, layers=case.names)
    with torch.no_grad():
        assert torch.isfinite(build(folded, plan)(tiny_batches[0])).all()
    assert replace(plan, layers=case.plan.layers) == case.plan


def test_there_are_two_forms():
    with pytest.raises(ValueError, match="form must be one of fold, requantize, found 'aciq'"):
        WeightCorrectionSettings(form="aciq")
