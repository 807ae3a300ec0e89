"""Grids with gradients: values as in numerics.affine, gradients as in LSQ."""

import pytest
import torch

from qtool.algorithms.reconstruction.grids import LearnedGrid, RandomMasks, on_grid
from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.spec import QuantSpec


def _qparams(mode="asym_u"):
    return qparams_from_range(torch.tensor(-1.0), torch.tensor(3.0), QuantSpec.from_mode(mode, 4))


@pytest.mark.parametrize("mode", ["asym_u", "asym_s", "sym", "sym_restr"])
def test_values_are_those_of_fake_quantize(mode):
    x = torch.linspace(-5, 5, 101)
    qparams = _qparams(mode)
    torch.testing.assert_close(LearnedGrid(qparams, None, True)(x).detach(), fake_quantize(x, qparams))
    behind = LearnedGrid(qparams, "relu", True)(x).detach()
    torch.testing.assert_close(behind, fake_quantize(x.relu(), qparams))


def test_gradients_are_those_of_straight_through_rounding():
    """Against autograd through x + (round(x) - x).detach()."""
    x = (torch.arange(-20, 21) / 8).requires_grad_()  # exact in steps of the grid, which is wide of it
    scale = torch.tensor(0.25, requires_grad=True)
    mask = (torch.arange(41) % 3 > 0).float()
    weight = torch.arange(41.0)
    found = torch.autograd.grad((on_grid(x, scale, -5.0, 7.0, mask) * weight).sum(), (x, scale))
    steps = x / scale
    passed = steps + (steps.round() - steps).detach()
    q = steps.round().detach()
    limited = torch.where((q >= -5) & (q <= 7), passed, q.clamp(-5, 7))
    plain = torch.where(mask > 0, limited * scale, x)
    expected = torch.autograd.grad((plain * weight).sum(), (x, scale))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_added_tensors_are_each_brought_to_the_scale_of_the_sum():
    qparams = _qparams("sym")
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    step = qparams.scale
    expected = (((a / step).round() + (b / step).round()).clamp(-8, 7) * step).relu()
    torch.testing.assert_close(LearnedGrid(qparams, "relu", True).added([a, b]).detach(), expected)


def test_a_scale_that_is_learned_finds_the_range_that_loses_least():
    """The range is far too wide for the values; the gradient narrows it."""
    x = torch.rand(500, generator=torch.Generator().manual_seed(0))
    grid = LearnedGrid(_qparams(), "relu", True)
    optimizer = torch.optim.Adam([grid.log_ratio], 0.02)
    losses = []
    for _ in range(200):
        loss = (grid(x) - x).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert float(grid.found().scale) < 0.5 * float(_qparams().scale)
    assert torch.equal(grid.found().zero_point, _qparams().zero_point)


def test_masks_have_the_share_that_was_asked_for_and_follow_the_seed():
    def masks():
        make = RandomMasks(0.25, torch.Generator().manual_seed(1), pool=1000)
        return [make(torch.Size(shape)) for shape in ((10, 20), (10, 20), (30, 100))]

    first, second, large = masks()
    assert all(map(torch.equal, (first, second, large), masks()))
    assert not torch.equal(first, second)
    assert set(large.unique().tolist()) == {0, 1}
    assert abs(float(large.mean()) - 0.25) < 0.05
