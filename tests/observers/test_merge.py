"""Merging records: as if all images had been measured together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.observers.rows import as_rows
from qtool.observers.stats import ActivationStats
from qtool.observers.tensor import Chunk, TensorObserver


def observe(x: torch.Tensor) -> ActivationStats:
    observer = TensorObserver((1, *x.shape[1:]))
    for number, part in enumerate(x.split(4)):
        observer.update(as_rows(part, len(part), 0, 1), Chunk(number, 4 * number, len(part)))
    return observer.sums().stats()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.floats(-5, 5), st.integers(0, 1000))
def test_merged_records_are_those_of_all_images(first, second, elements, drift, seed):
    x = torch.randn(first + second, elements, generator=torch.Generator().manual_seed(seed))
    x[first:] += drift
    a, b, whole = observe(x[:first]), observe(x[first:]), observe(x)
    merged = a.merge(b)
    assert (merged.min, merged.max) == (whole.min, whole.max)
    assert (merged.total_numel, merged.shape) == (whole.total_numel, whole.shape)
    for name in ("avg_min", "avg_max", "mean", "std"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-6, abs=1e-6), name
    # b is moved through histograms whose bins are 1/4096 of the range at most, with few values in each.
    assert merged.b == pytest.approx(whole.b, abs=0.02 * (merged.max - merged.min))
    assert merged.histogram.exponent == whole.histogram.exponent
    np.testing.assert_array_equal(merged.histogram.counts, whole.histogram.counts)
    np.testing.assert_array_equal(merged.channel_max, whole.channel_max)
    assert sorted(merged.image_min) == sorted(whole.image_min)


def test_b_of_merged_records_is_near_its_two_pass_value():
    x = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0))
    x[20:] = x[20:] * 2 + 1
    merged = observe(x[:20]).merge(observe(x[20:]))
    assert merged.b == pytest.approx(float((x.double() - x.double().mean()).abs().mean()), rel=1e-4)


def test_records_without_their_details_are_refused():
    with pytest.raises(ValueError, match="mean, std, b, histogram, image_min, image_max: missing"):
        ActivationStats(0, 1, total_numel=3).merge(ActivationStats(0, 1, total_numel=3))


def test_records_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 2\) and \(1, 3\)"):
        observe(torch.ones(2, 2)).merge(observe(torch.ones(2, 3)))


def test_merged_bins_are_as_wide_as_the_whole_range_wants_where_the_sample_missed_its_ends():
    x = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    a, b = x[:2].clone(), x[2:].clone()
    a[0, 5017], b[0, 5017] = -500.0, 500.0  # an element of those that the histogram does not count
    merged, whole = observe(a).merge(observe(b)), observe(torch.cat([a, b]))
    assert merged.max == 500.0 > merged.histogram.edges[-1]
    assert merged.histogram.exponent == whole.histogram.exponent
