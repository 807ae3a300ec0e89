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


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30),
    st.floats(-40, 40),
    st.floats(-40, 40),
    st.integers(1, 50),
)
def test_rebinning_loses_no_count(inner, first, second, bins):
    h = Histogram(0, -10, np.array([1, *inner, 2]))
    low, high = min(first, second), max(first, second)
    counts = h.rebinned(low, high, bins)
    assert counts.shape == (bins,)
    assert counts.min() >= 0
    assert counts.sum() == pytest.approx(h.total)


def test_rebinning_at_the_same_edges_changes_nothing():
    h = Histogram(-3, 5, np.array([3, 0, 7, 1]))
    assert h.rebinned(h.edges[0], h.edges[-1], 4).tolist() == [3, 0, 7, 1]


def test_one_point_has_all_counts_in_the_middle_bin():
    assert Histogram(0, 2, np.array([6])).rebinned(2.5, 2.5, 5).tolist() == [0, 0, 6, 0, 0]


@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3)
)
def test_total_variation_is_a_distance(first, second):
    a, b = (Histogram(0, 0, np.array([1, *v, 1])) for v in (first, second))
    wanted = np.abs(a.counts / a.total - b.counts / b.total).sum() / 2
    assert a.total_variation(b) == pytest.approx(wanted)
    assert a.total_variation(b) == b.total_variation(a)
    assert a.total_variation(a) == 0
    assert a.total_variation(Histogram(0, 100, b.counts)) == pytest.approx(1)


def test_total_variation_of_samples_of_one_distribution_is_small():
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    near = Histogram.of(x[:20_000]).total_variation(Histogram.of(x[20_000:]))
    far = Histogram.of(x[:20_000]).total_variation(Histogram.of(x[20_000:] + 1))
    # Two halves of N samples in so few bins differ by about sqrt(bins / (pi N)).
    assert near < 0.06
    assert far == pytest.approx(0.383, abs=0.02)  # 2 Phi(1/2) - 1
