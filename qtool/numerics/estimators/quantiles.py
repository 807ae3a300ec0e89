"""Ranges that leave out a share of the values: by a percentile, or by the chance of an outlier."""

from __future__ import annotations

import numpy as np

from qtool.numerics.estimators.bins import absolute
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import ClipSpec, QuantSpec


def percentile_range(histogram: Histogram, spec: QuantSpec, clip: ClipSpec) -> tuple[float, float]:
    """The range that holds clip.percentile percent of the values.

    On a symmetric grid that is the percentile of |x|; otherwise as many values are left out on
    each side. Inside a bin the values are taken as spread evenly.

    Returns:
        low <= high, units of x.

    Example:
        >>> import torch
        >>> h = Histogram.of(torch.arange(1000.0))
        >>> [round(v) for v in percentile_range(h, QuantSpec(symmetric=False), ClipSpec(percentile=90))]
        [49, 949]
    """
    if spec.symmetric:
        return _symmetric(histogram, clip.percentile / 100)
    return _inner(histogram, (100 - clip.percentile) / 200)


def quantile_range(histogram: Histogram, spec: QuantSpec, clip: ClipSpec) -> tuple[float, float]:
    """The range that leaves out a share of clip.outlier_prob on each side, or of |x| on a symmetric grid.

    Returns:
        low <= high, units of x.

    Reference:
        NNCF's quantile reducers, which have the same default, 1e-4.
    """
    if spec.symmetric:
        return _symmetric(histogram, 1 - clip.outlier_prob)
    return _inner(histogram, clip.outlier_prob)


def _symmetric(histogram: Histogram, share: float) -> tuple[float, float]:
    reach = float(absolute(histogram).quantile(share))
    return -reach, reach


def _inner(histogram: Histogram, outside: float) -> tuple[float, float]:
    low, high = histogram.quantile(np.array([outside, 1 - outside]))
    return float(low), float(high)
