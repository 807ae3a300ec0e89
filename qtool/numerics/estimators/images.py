"""Ranges that combine the smallest and largest element of each image.

The largest value of a tensor grows with the number of images; its mean or median over the images
does not. The mean is clip mode `avg`.

Reference:
    NNCF's aggregators median, mean_no_outliers and median_no_outliers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.numerics.histogram import Floats
from qtool.numerics.spec import ClipSpec, QuantSpec

PerImage = NDArray[np.floating[Any]]


def image_range(
    image_min: PerImage, image_max: PerImage, spec: QuantSpec, clip: ClipSpec
) -> tuple[float, float]:
    """The range that an aggregator makes of the ranges of single images.

    Args:
        image_min, image_max: each image's smallest and largest element, (images,), not empty.
        spec: the grid; if it is symmetric, each image's largest magnitude is aggregated.
        clip: its mode names the aggregator.

    Returns:
        low <= high, units of x.

    Example:
        >>> low, high = np.array([0, -1, 0.0]), np.array([1, 3, 100.0])
        >>> image_range(low, high, QuantSpec(symmetric=False), ClipSpec("median"))
        (0.0, 3.0)
    """
    low, high = image_min.astype(np.float64), image_max.astype(np.float64)
    aggregate = AGGREGATORS[clip.mode]
    if spec.symmetric:
        reach = aggregate(np.maximum(-low, high), clip.outlier_prob)
        return -reach, reach
    return aggregate(low, clip.outlier_prob), aggregate(high, clip.outlier_prob)


def without_outliers(values: Floats, outlier_prob: float) -> Floats:
    """The values between their quantiles outlier_prob and 1 - outlier_prob; all of them if none is.

    Args:
        values: (n,), not empty.
        outlier_prob: 0 to 0.5. However small, it leaves out the smallest and the largest of three or more.
    """
    low, high = np.quantile(values, [outlier_prob, 1 - outlier_prob])
    kept = values[(values >= low) & (values <= high)]
    return kept if len(kept) else values


AGGREGATORS: dict[str, Callable[[Floats, float], float]] = {
    "median": lambda values, _: float(np.median(values)),
    "mean_no_outliers": lambda values, p: float(np.mean(without_outliers(values, p))),
    "median_no_outliers": lambda values, p: float(np.median(without_outliers(values, p))),
}
