"""Trained weights: they start at the plan's integers, and their grids follow."""

import pytest
import torch
from torch import nn

from qtool.algorithms.lsq.weights import TrainedWeight, rounding_to
from qtool.numerics.affine import fake_quantize, qparams_from_range, quantize
from qtool.numerics.spec import QuantSpec
from qtool.quantizers.plan import INTEGER, LayerPlan

CPU = torch.device("cpu")


def _layer(axis=0, mode="sym", bits=3, other=None):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    conv.weight.copy_(
        torch.randn(6, 4, 3, 3, generator=generator) * torch.logspace(-2, 1, 6)[:, None, None, None]
    )
    rows = conv.weight.flatten(1)
    ends = (rows.amin(1), rows.amax(1)) if axis == 0 else (rows.min(), rows.max())
    # Narrower than the weights, which so saturate.
    qparams = qparams_from_range(ends[0] * 0.6, ends[1] * 0.6, QuantSpec.from_mode(mode, bits, axis))
    weight_q = quantize(conv.weight, qparams).to(torch.int8)
    if other is not None:
        weight_q = other(weight_q)
    return conv, LayerPlan(INTEGER, "conv", weight=qparams, weight_q=weight_q)


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s"])
def test_it_starts_with_the_values_of_the_plan(axis, mode):
    conv, plan = _layer(axis, mode)
    weight = TrainedWeight(conv, plan, False, CPU)
    torch.testing.assert_close(weight.weight().detach(), fake_quantize(conv.weight, plan.weight))
    assert torch.equal(weight.bias().detach(), conv.bias)
    assert weight.grid().same_grid(plan.weight)
    assert float((weight.moved() - 1).abs().max()) == 0


def test_it_starts_with_integers_that_a_correction_has_chosen():
    conv, plan = _layer(
        other=lambda q: (q + (torch.arange(q.numel()) % 3 == 0).reshape(q.shape)).clamp(-4, 3)
    )
    weight = TrainedWeight(conv, plan, False, CPU)
    assert torch.equal(quantize(weight.latent().detach(), plan.weight).to(torch.int8), plan.weight_q)


def test_values_that_round_to_their_integer_already_stay_as_they_are():
    conv, plan = _layer()
    kept = rounding_to(conv.weight, plan.weight, plan.weight_q)
    steps = conv.weight / plan.weight.scale[:, None, None, None]
    near_a_border = ((steps - steps.floor() - 0.5).abs() < 0.02) & (steps > -4) & (steps < 3)
    assert torch.equal(kept[~near_a_border], conv.weight[~near_a_border])


def test_units_make_channels_of_any_size_alike():
    conv, plan = _layer()
    values = TrainedWeight(conv, plan, False, CPU).values.detach()
    rms = values.flatten(1).square().mean(1).sqrt()
    assert float(conv.weight.flatten(1).norm(dim=1).max() / conv.weight.flatten(1).norm(dim=1).min()) > 100
    torch.testing.assert_close(rms, torch.ones(6), rtol=0.05, atol=0)


def test_a_scale_that_follows_keeps_its_share_of_the_largest_magnitude():
    conv, plan = _layer()
    weight = TrainedWeight(conv, plan, True, CPU)
    assert weight.log_ratio is None and weight.grid().same_grid(plan.weight)
    with torch.no_grad():
        weight.values[2] *= 2
    torch.testing.assert_close(weight.moved(), torch.tensor([1.0, 1, 2, 1, 1, 1]))
    torch.testing.assert_close(weight.weight()[2].detach(), 2 * fake_quantize(conv.weight, plan.weight)[2])


def test_a_channel_of_zeros_stays_zero_and_finite():
    conv, _ = _layer()
    conv.weight[1] = 0
    qparams = qparams_from_range(
        conv.weight.flatten(1).amin(1), conv.weight.flatten(1).amax(1), QuantSpec(num_bits=2, axis=0)
    )
    plan = LayerPlan(INTEGER, "conv", weight=qparams, weight_q=quantize(conv.weight, qparams).to(torch.int8))
    weight = TrainedWeight(conv, plan, False, CPU)
    weight.weight().square().sum().backward()
    assert not bool(weight.weight()[1].detach().any())
    assert bool(torch.isfinite(weight.values.grad).all() and torch.isfinite(weight.log_ratio.grad).all())
