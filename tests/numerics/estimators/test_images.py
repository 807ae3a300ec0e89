"""Ranges of images put together, worked by hand."""

import numpy as np
import pytest

from qtool.numerics.estimators.images import AGGREGATORS, image_range, without_outliers
from qtool.numerics.spec import ClipSpec, QuantSpec

SYMMETRIC, ASYMMETRIC = QuantSpec(), QuantSpec(symmetric=False)
LOW, HIGH = np.array([-2, -1, -3, 0, -90], np.float32), np.array([4, 5, 1, 70, 6], np.float32)


@pytest.mark.parametrize(
    ("mode", "spec", "low", "high"),
    [
        ("median", ASYMMETRIC, -2, 5),
        ("mean_no_outliers", ASYMMETRIC, -2, 5),  # without -90 and 0, without 70 and 1
        ("median_no_outliers", ASYMMETRIC, -2, 5),
        ("median", SYMMETRIC, -5, 5),  # magnitudes 4 5 3 70 90
        ("mean_no_outliers", SYMMETRIC, -79 / 3, 79 / 3),
        ("median_no_outliers", SYMMETRIC, -5, 5),
    ],
)
def test_aggregates_are_those_worked_by_hand(mode, spec, low, high):
    assert image_range(LOW, HIGH, spec, ClipSpec(mode)) == pytest.approx((low, high))


def test_median_of_an_even_number_is_the_mean_of_the_middle_two():
    found = image_range(np.array([0.0, -4.0]), np.array([1.0, 3.0]), ASYMMETRIC, ClipSpec("median"))
    assert found == (-2.0, 2.0)


def test_a_higher_outlier_prob_leaves_out_more():
    values = np.arange(101.0)
    assert without_outliers(values, 1e-4).tolist() == values[1:-1].tolist()
    assert without_outliers(values, 0.1).tolist() == values[10:-10].tolist()


@pytest.mark.parametrize("values", [[3.0], [1.0, 3.0], [2.0, 2.0, 2.0]])
def test_some_value_is_always_kept(values):
    assert without_outliers(np.array(values), 1e-4).tolist() == values


@pytest.mark.parametrize("mode", AGGREGATORS)
@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC])
def test_order_of_the_images_does_not_matter(mode, spec):
    low, high = np.random.default_rng(0).standard_normal((2, 31)) * 3 + [[-5], [5]]
    order = np.random.default_rng(1).permutation(31)
    clip = ClipSpec(mode, outlier_prob=0.05)
    assert image_range(low, high, spec, clip) == pytest.approx(
        image_range(low[order], high[order], spec, clip)
    )
