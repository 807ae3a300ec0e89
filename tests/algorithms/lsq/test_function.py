"""Rounding with learned steps: values of fake_quantize, gradients worked by hand from the paper."""

import pytest
import torch

from qtool.algorithms.lsq.function import gradient_scale, lsq
from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.spec import QuantSpec


def _gradients(x, scale, low, high, grad, balance=1.0):
    x, scale = torch.tensor(x, requires_grad=True), torch.tensor(scale, requires_grad=True)
    y = lsq(x, scale, low, high, balance)
    y.backward(torch.tensor(grad))
    return y.detach(), x.grad, scale.grad


def test_gradients_are_those_worked_by_hand():
    """s = 0.5, integers -2 to 1; x / s = -3, -1.5, -0.4, 0.6, 2.8."""
    y, of_x, of_scale = _gradients(
        [-1.5, -0.75, -0.2, 0.3, 1.4], 0.5, -2, 1, [1.0, 10.0, 100.0, 1000.0, 10000.0]
    )
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.5, 0.5]
    # Outside: low, high; inside: round(x / s) - x / s, where -1.5 rounds to -2, the even one.
    by_hand = [-2.0, -0.5, 0.4, 0.4, 1.0]
    assert of_x.tolist() == [0.0, 10.0, 100.0, 1000.0, 0.0]
    expected = sum(g * v for g, v in zip([1, 10, 100, 1000, 10000], by_hand, strict=True))
    assert of_scale.item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_scale_is_balanced_and_that_of_x_is_not():
    plain = _gradients([0.3, 9.0], 1.0, 0, 3, [1.0, 1.0])
    balanced = _gradients([0.3, 9.0], 1.0, 0, 3, [1.0, 1.0], gradient_scale(2, 3))
    assert torch.equal(plain[1], balanced[1])
    assert plain[2].item() == pytest.approx(2.7)
    assert balanced[2].item() == pytest.approx(2.7 / 6**0.5)


def test_each_channel_has_the_gradient_of_its_own_scale():
    x = [[0.6, 5.0], [-0.6, -5.0]]
    _, _, together = _gradients(x, [[1.0], [2.0]], -2.0, 1.0, [[1.0, 1.0], [1.0, 1.0]])
    _, _, first = _gradients(x[0], 1.0, -2.0, 1.0, [1.0, 1.0])
    _, _, second = _gradients(x[1], 2.0, -2.0, 1.0, [1.0, 1.0])
    assert first.item() == pytest.approx(1.4) and second.item() == pytest.approx(0.3 - 2.0)
    assert together.flatten().tolist() == pytest.approx([first.item(), second.item()])


@pytest.mark.parametrize("mode", ["asym_u", "sym", "sym_restr"])
def test_values_are_those_of_fake_quantize(mode):
    x = torch.linspace(-5, 5, 101)
    qparams = qparams_from_range(torch.tensor(-1.0), torch.tensor(3.0), QuantSpec.from_mode(mode, 4))
    zero_point = float(qparams.zero_point)
    low, high = qparams.spec.quant_min - zero_point, qparams.spec.quant_max - zero_point
    assert torch.equal(lsq(x, qparams.scale, low, high), fake_quantize(x, qparams))


def test_large_tensors_in_any_order_in_memory_have_the_same_gradients():
    """Parts that fit into the cache, against autograd through x + (round(x) - x).detach()."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, 8, 130, 131, generator=generator)
    weight = torch.randn(plain.shape, generator=generator)
    for order in (torch.contiguous_format, torch.channels_last):
        x = plain.contiguous(memory_format=order).requires_grad_()
        scale = torch.tensor(0.25, requires_grad=True)
        found = torch.autograd.grad((lsq(x, scale, -4.0, 3.0) * weight).sum(), (x, scale))
        steps = (x / scale).clamp(-4, 3)
        passed = steps + (steps.round() - steps).detach()
        expected = torch.autograd.grad((passed * scale * weight).sum(), (x, scale))
        assert torch.equal(found[0], expected[0])
        # Sums of 400,000 numbers in another order.
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-2)


def test_the_balance_is_that_of_the_paper():
    assert gradient_scale(16 * 16, 4) == pytest.approx(1 / 32)
    assert gradient_scale(0, 0) == 1
