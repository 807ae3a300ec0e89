"""Trained grids of activations: learned steps, and ranges that follow."""

from dataclasses import replace

import pytest
import torch

from qtool.algorithms.lsq.grids import DECAY, LearnedStep, MovingRange, range_of
from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.spec import QuantSpec

CPU = torch.device("cpu")
MODES = ["asym_u", "asym_s", "sym", "sym_restr"]


def _qparams(mode="asym_u", low=-1.0, high=3.0):
    return qparams_from_range(torch.tensor(low), torch.tensor(high), QuantSpec.from_mode(mode, 4))


@pytest.mark.parametrize("kind", [LearnedStep, MovingRange])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_fake_quantize_behind_the_activation(kind, mode):
    x = torch.linspace(-5, 5, 101).reshape(1, 101)
    for activation, limit, expected in (
        (None, None, x),
        ("relu", None, x.relu()),
        ("relu6", torch.full((101,), 2.0), x.clamp(0, 2)),
    ):
        grid = kind(_qparams(mode), activation, limit, CPU)
        torch.testing.assert_close(grid(x).detach(), fake_quantize(expected, _qparams(mode)))


def test_a_relu_in_front_of_integers_from_zero_is_their_clamp():
    qparams = _qparams(low=0.0)
    x = torch.linspace(-5, 5, 101).reshape(1, 101).requires_grad_()
    y = LearnedStep(qparams, "relu", None, CPU)(x)
    torch.testing.assert_close(y.detach(), fake_quantize(x.detach().relu(), qparams))
    y.sum().backward()
    assert float(x.grad[x < 0].abs().max()) == 0


def test_added_tensors_are_each_brought_to_the_scale_of_the_sum():
    qparams = _qparams("sym")
    a, b = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))
    step = qparams.scale
    expected = (((a / step).round() + (b / step).round()).clamp(-8, 7) * step).relu()
    torch.testing.assert_close(LearnedStep(qparams, "relu", None, CPU).added([a, b]).detach(), expected)


def test_a_learned_step_moves_and_the_zero_point_stays():
    grid = LearnedStep(_qparams(), None, None, CPU)
    with torch.no_grad():
        grid.log_ratio.fill_(0.5)
    found = grid.found()
    assert float(found.scale / _qparams().scale) == pytest.approx(float(torch.tensor(0.5).exp()), rel=1e-6)
    assert torch.equal(found.zero_point, _qparams().zero_point)
    assert float(grid.moved()) == pytest.approx(1.6487, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_a_range_that_is_seen_again_and_again_is_taken(mode):
    grid = MovingRange(_qparams(mode), None, None, CPU)
    assert grid.found().same_grid(_qparams(mode))
    x = torch.tensor([[-0.5, 6.0]])
    for _ in range(1000):
        grid.see(x)
    expected = _qparams(mode, -0.5, 6.0)
    torch.testing.assert_close(grid.found().scale, expected.scale, rtol=1e-3, atol=0)
    assert torch.equal(grid.found().zero_point, expected.zero_point)


def test_one_batch_moves_a_range_by_the_share_that_is_documented():
    grid = MovingRange(_qparams(low=0.0, high=3.0), "relu", None, CPU)
    before = grid.range.clone()
    grid(torch.tensor([[-7.0, 13.0]]))  # negative values are cut off by the ReLU
    torch.testing.assert_close(grid.range, DECAY * before + (1 - DECAY) * torch.tensor([0.0, 13.0]))


@pytest.mark.parametrize("mode", MODES)
def test_the_range_of_a_grid_gives_that_grid(mode):
    qparams = _qparams(mode)
    low, high = range_of(qparams)
    found = qparams_from_range(low, high, qparams.spec)
    assert found.same_grid(replace(qparams, scale=found.scale))
    torch.testing.assert_close(found.scale, qparams.scale)
