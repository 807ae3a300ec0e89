"""Histograms: counts against NumPy, and independence of how the values were split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.histogram import MAX_BINS, Histogram


def values(seed: int, count: int, scale: float, shift: float, outlier: float) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale + shift
    x[0] *= outlier
    return x


samples = st.builds(
    values,
    st.integers(0, 1000),
    st.integers(1, 500),
    st.sampled_from([1e-30, 1e-4, 1.0, 3e5]),
    st.sampled_from([0.0, -2.0, 1e3]),
    st.sampled_from([1.0, 1e4]),
)


@given(samples)
def test_counts_are_those_of_numpy(x):
    h = Histogram.of(x)
    index = np.floor(x.double().numpy() * math.ldexp(1.0, -h.exponent)).astype(np.int64)
    np.testing.assert_array_equal(np.bincount(index - h.first, minlength=len(h.counts)), h.counts)
    assert len(h.counts) <= MAX_BINS


@given(samples, st.integers(1, 100), st.randoms(use_true_random=False))
def test_any_split_and_order_of_merging_gives_the_same_histogram(x, size, random):
    whole = Histogram.of(x)
    parts = [Histogram.of(p) for p in x.split(size)]
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop().merge(parts.pop()))
    assert (parts[0].exponent, parts[0].first) == (whole.exponent, whole.first)
    np.testing.assert_array_equal(parts[0].counts, whole.counts)


@given(samples, st.integers(0, 70))
def test_coarsening_loses_no_count(x, steps):
    h = Histogram.of(x)
    coarse = h.coarsened(h.exponent + steps)
    assert coarse.total == h.total == x.numel()
    assert coarse.edges[0] <= h.edges[0] and coarse.edges[-1] >= h.edges[-1]


def test_a_histogram_cannot_become_finer():
    h = Histogram.of(torch.ones(3))
    with pytest.raises(ValueError, match=f"exponent must be at least {h.exponent}"):
        h.coarsened(h.exponent - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        Histogram.of(torch.tensor([1.0, bad]))


def test_an_empty_tensor_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Histogram.of(torch.zeros(0))


@given(samples)
def test_clamping_at_zero_is_the_histogram_of_the_relu(x):
    clamped, wanted = Histogram.of(x).clamped(0.0, math.inf), Histogram.of(x.relu())
    wanted = wanted.coarsened(max(clamped.exponent, wanted.exponent))
    assert clamped.total == wanted.total
    assert clamped.first == wanted.first >= 0
    np.testing.assert_array_equal(clamped.counts, wanted.counts)


def test_values_outside_a_clamp_end_in_its_outer_bins():
    h = Histogram.of(torch.tensor([-4.0, -1.0, 0.5, 3.0, 7.0])).clamped(-2.0, 2.0)
    assert h.total == 5
    assert h.edges[0] >= -2.0 and h.edges[-1] <= 2.0
    assert (int(h.counts[0]), int(h.counts[-1])) == (1, 2)


@pytest.mark.parametrize(("low", "high", "bin_low"), [(10.0, 20.0, 10.0), (-20.0, -10.0, -10.0)])
def test_a_clamp_beside_all_values_leaves_one_bin_at_its_limit(low, high, bin_low):
    h = Histogram.of(torch.tensor([-1.0, 1.0])).clamped(low, high)
    assert h.total == 2 and len(h.counts) == 1
    assert low <= h.edges[0] < h.edges[1] <= high
    assert abs(h.edges[0] - bin_low) <= h.width


@given(st.integers(0, 100), st.floats(0.001, 0.999))
def test_quantiles_are_within_a_bin_of_those_of_the_values(seed, q):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    h = Histogram.of(x)
    low, high = torch.quantile(x, torch.tensor([q - 0.001, q + 0.001]).clamp(0, 1)).tolist()
    assert low - h.width <= float(h.quantile(q)) <= high + h.width
    assert h.cdf(float(h.quantile(q))) == pytest.approx(q, abs=1e-9)


def test_a_quantile_does_not_lean_towards_a_lone_outlier():
    x = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1000.0])])
    assert float(Histogram.of(x).quantile(0.99)) < 1.2


def test_zeros_have_a_histogram():
    h = Histogram.of(torch.zeros(5))
    assert (h.first, h.total, len(h.counts)) == (0, 5, 1)
    assert h.merge(Histogram.of(torch.ones(3))).total == 8
