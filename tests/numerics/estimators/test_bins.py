"""Folding at zero and widening keep every count."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.estimators.bins import absolute, between, is_one_sided, limited
from qtool.numerics.histogram import Histogram

tensors = st.builds(
    lambda seed, scale, shift: (
        torch.randn(300, generator=torch.Generator().manual_seed(seed)) * scale + shift * scale
    ),
    st.integers(0, 100),
    st.sampled_from([1e-3, 1.0, 40.0]),
    st.sampled_from([0.0, 1.5, -6.0, 6.0, 3000.0]),
)


@given(tensors)
def test_folded_counts_are_those_of_the_magnitudes(x):
    h = Histogram.of(x)
    folded = absolute(h)
    # A negative value at an edge of its bin counts as just above it, and so its magnitude as just below.
    index = torch.floor(x.double() / h.width)
    magnitudes = torch.where(index < 0, -1 - index, index).long()
    assert folded.first == magnitudes.min() >= 0
    assert folded.counts.tolist() == torch.bincount(magnitudes - folded.first).tolist()


@given(tensors, st.integers(1, 5000))
def test_a_limited_histogram_reaches_from_zero_in_so_many_bins_and_no_wider_ones(x, max_bins):
    h = Histogram.of(x)
    found = limited(h, max_bins)
    assert found.total == h.total
    assert max(found.last + 1, -found.first) <= max_bins
    if found.exponent > h.exponent:
        finer = h.coarsened(found.exponent - 1)
        assert max(finer.last + 1, -finer.first) > max_bins


def test_counts_between_bins_are_padded_with_zeros():
    h = Histogram(0, 2, np.array([5, 7]))
    assert between(h, -1, 4).tolist() == [0, 0, 0, 5, 7, 0]


@pytest.mark.parametrize(
    ("values", "one_sided"),
    [([0.0, 1.0], True), ([-1.0, 0.0], True), ([-1.0, -0.5], True), ([-1.0, 1.0], False)],
)
def test_one_sided_is_what_lies_on_one_side_of_zero(values, one_sided):
    assert is_one_sided(Histogram.of(torch.tensor(values))) == one_sided
