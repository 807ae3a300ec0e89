"""The quantization error in a p-norm, and the choice of p."""

import numpy as np
import pytest
import torch

from qtool.algorithms.lapq import P_VALUES, lp_error, parabola_minimum
from qtool.numerics.spec import QuantSpec


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_lp_error_is_that_of_numpy(p):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    scale = 2 * 1.5 / 15
    x_hat = np.clip(np.round(x.numpy() / scale), -8, 7) * scale
    expected = np.mean(np.abs(x.numpy() - x_hat) ** p)
    found = lp_error(x, torch.tensor(-1.5), torch.tensor(1.5), QuantSpec(num_bits=4), p)
    assert found == pytest.approx(expected, rel=1e-4)  # float32 against float64


def test_a_larger_p_clips_less():
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 999))
    limit = x.max()
    widths = torch.linspace(0.2, 1.2, 101) * limit
    best = [float(min(widths, key=lambda w: lp_error(x, -w, w, QuantSpec(num_bits=3), p))) for p in (1, 2, 4)]
    assert best[0] < best[1] < best[2] < limit


def test_the_parabola_is_that_of_its_points():
    x = np.array(P_VALUES)
    assert parabola_minimum(x, 0.3 * (x - 2.7) ** 2 + 1) == pytest.approx(2.7)
    assert parabola_minimum(x, -(x**2)) is None
    assert parabola_minimum(x, (x - 5) ** 2) is None
