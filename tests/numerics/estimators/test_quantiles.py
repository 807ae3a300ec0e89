"""Percentiles of histograms are those of the values, within a bin."""

import numpy as np
import pytest
import torch

from qtool.numerics.estimators.quantiles import percentile_range, quantile_range
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import ClipSpec, QuantSpec

SYMMETRIC, ASYMMETRIC = QuantSpec(), QuantSpec(symmetric=False)


@pytest.mark.parametrize("name", ["G", "G50", "R", "R30", "Lp"])
def test_percentile_of_the_magnitudes_is_the_published_one(published, samples, name):
    h = Histogram.of(samples[name])
    low, high = percentile_range(h, SYMMETRIC, ClipSpec("percentile", percentile=99.99))
    # At the far end, some bins hold one value and others none.
    assert -low == high == pytest.approx(published["quantile_9999_of_abs"][name], abs=10 * h.width)


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9])
def test_asymmetric_percentile_leaves_out_as_much_on_each_side(samples, percentile):
    x = samples["Lp"].numpy() + 1.0
    h = Histogram.of(torch.from_numpy(x))
    found = percentile_range(h, ASYMMETRIC, ClipSpec("percentile", percentile=percentile))
    outside = (100 - percentile) / 2
    wanted = np.percentile(x, [outside, 100 - outside])
    assert found == pytest.approx(tuple(wanted), abs=3 * h.width)


def test_percentile_of_all_is_the_whole_range(samples):
    h = Histogram.of(samples["G50"])
    low, high = percentile_range(h, ASYMMETRIC, ClipSpec("percentile", percentile=100))
    assert (low, high) == (h.edges[0], h.edges[-1])


def test_a_lower_percentile_gives_a_narrower_range(samples):
    h = Histogram.of(samples["Lp"])
    ends = [percentile_range(h, SYMMETRIC, ClipSpec(percentile=p))[1] for p in (90, 99, 99.9, 99.99, 100)]
    assert ends == sorted(ends) and ends[0] < ends[-1] / 4


@pytest.mark.parametrize("outlier_prob", [1e-1, 1e-2, 1e-3])
def test_quantile_leaves_out_its_share_on_each_side(samples, outlier_prob):
    x = samples["Lp"].numpy()
    h = Histogram.of(samples["Lp"])
    clip = ClipSpec("quantile", outlier_prob=outlier_prob)
    wanted = np.quantile(x, [outlier_prob, 1 - outlier_prob])
    assert quantile_range(h, ASYMMETRIC, clip) == pytest.approx(tuple(wanted), abs=3 * h.width)
    reach = float(np.quantile(np.abs(x), 1 - outlier_prob))
    assert quantile_range(h, SYMMETRIC, clip) == pytest.approx((-reach, reach), abs=3 * h.width)


@pytest.mark.parametrize("estimate", [percentile_range, quantile_range])
@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC])
def test_zeros_have_a_range(estimate, spec):
    low, high = estimate(Histogram.of(torch.zeros(4)), spec, ClipSpec())
    assert -1e-30 < low <= high < 1e-30
