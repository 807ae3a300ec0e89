"""Ranges per channel: each is that of its channel alone, and no other is much better."""

import math

import numpy as np
import pytest
import torch

from qtool.numerics.estimators import rows as rows_module
from qtool.numerics.estimators.mse import mse_range
from qtool.numerics.estimators.rows import ROW_ESTIMATORS, mse_of_rows, percentile_of_rows
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import MODES, ClipSpec, QuantSpec

GRIDS = [QuantSpec.from_mode(mode, bits, axis=0) for mode in MODES for bits in (3, 8)]
CLIP = ClipSpec("percentile", percentile=95)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Seven channels: normal with and without an outlier, heavy tails, one sign, small, zero."""
    x = torch.randn(7, 600, generator=torch.Generator().manual_seed(0))
    x[1, 5] = 20
    x[2] = x[2] ** 3
    x[3] = x[3].abs()
    x[4] = -x[4].abs()
    x[5] *= 1e-3
    x[6] = 0
    return x


def per_tensor(spec: QuantSpec) -> QuantSpec:
    return QuantSpec.from_mode(spec.mode, spec.num_bits)


@pytest.mark.parametrize("estimator", ROW_ESTIMATORS.values(), ids=ROW_ESTIMATORS)
@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("chunk", [1, 1300, 1 << 16])
def test_channels_do_not_depend_on_each_other(weight, monkeypatch, estimator, spec, chunk):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    low, high = estimator(weight, spec, CLIP)
    order = torch.tensor([4, 6, 0, 2, 5, 1, 3])
    shuffled = estimator(weight[order], spec, CLIP)
    assert (low[order].tolist(), high[order].tolist()) == (shuffled[0].tolist(), shuffled[1].tolist())
    assert low.shape == high.shape == (7,) and low.dtype == weight.dtype


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_no_other_range_is_much_better(weight, squared_error, spec):
    low, high = mse_of_rows(weight, spec, ClipSpec("mse"))
    grid = per_tensor(spec)
    for x, a, b in zip(weight, low, high, strict=True):
        found = squared_error(x, a, b, grid)
        ends = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
        others = [
            squared_error(x, ends[0] * f, ends[1] * f, grid) for f in torch.linspace(0.13, 1, 60).tolist()
        ]
        # A channel has few values, and the error jumps as they change levels; one percent is 0.04 dB.
        assert found <= 1.05 * min(others) + 1e-12
        assert ends[0] - 1e-6 <= float(a) <= 0 <= float(b) <= ends[1] + 1e-6 or spec.symmetric


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_error_is_about_that_of_the_search_in_a_histogram(weight, squared_error, spec):
    low, high = mse_of_rows(weight, spec, ClipSpec("mse"))
    grid = per_tensor(spec)
    for x, a, b in zip(weight[:5], low, high, strict=False):
        histogram = squared_error(x, *mse_range(Histogram.of(x), grid), grid)
        assert squared_error(x, a, b, grid) == pytest.approx(histogram, rel=0.1)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_percentile_is_that_of_each_channel(weight, spec):
    low, high = percentile_of_rows(weight, spec, CLIP)
    x = weight.numpy()
    if spec.symmetric:
        reach = np.percentile(np.abs(x), 95, axis=1)
        wanted = -reach, reach
    else:
        wanted = np.percentile(x, [2.5, 97.5], axis=1)
    np.testing.assert_allclose(low.numpy(), wanted[0], rtol=1e-6)
    np.testing.assert_allclose(high.numpy(), wanted[1], rtol=1e-6)


@pytest.mark.parametrize("estimator", ROW_ESTIMATORS.values(), ids=ROW_ESTIMATORS)
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_scaling_by_a_power_of_two_scales_the_ranges_exactly(weight, estimator, spec):
    factor = math.ldexp(1.0, -5)
    for one, scaled in zip(
        estimator(weight, spec, CLIP), estimator(weight * factor, spec, CLIP), strict=True
    ):
        assert (one * factor).tolist() == scaled.tolist()


def test_channels_of_one_value_have_a_range():
    low, high = mse_of_rows(
        torch.tensor([[2.0], [-3.0]]), QuantSpec(symmetric=False, axis=0), ClipSpec("mse")
    )
    assert (low.tolist(), high.tolist()) == ([0, -3], [2, 0])
