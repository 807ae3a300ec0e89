"""Histograms as the estimators read them: folded at zero, and with bins counted from zero."""

from __future__ import annotations

import numpy as np

from qtool.numerics.histogram import Counts, Histogram


def is_one_sided(histogram: Histogram) -> bool:
    """Whether no value lies below zero, or none above the first bin."""
    return histogram.first >= 0 or histogram.last <= 0


def absolute(histogram: Histogram) -> Histogram:
    """The histogram of |x|. As zero is an edge, no bin is cut.

    Example:
        >>> h = Histogram(0, -2, np.array([5, 1, 2, 4]))
        >>> absolute(h).first, absolute(h).counts.tolist()
        (0, [3, 9])
    """
    if histogram.first >= 0:
        return histogram
    if histogram.last < 0:
        return Histogram(histogram.exponent, -1 - histogram.last, histogram.counts[::-1])
    negative, positive = histogram.counts[: -histogram.first][::-1], histogram.counts[-histogram.first :]
    counts = np.zeros(max(len(negative), len(positive)), dtype=np.int64)
    counts[: len(negative)] += negative
    counts[: len(positive)] += positive
    first = int(np.flatnonzero(counts)[0])
    return Histogram(histogram.exponent, first, counts[first:])


def limited(histogram: Histogram, max_bins: int) -> Histogram:
    """The histogram in bins so wide that at most max_bins reach from zero to its farther end."""
    exponent, reach = histogram.exponent, max(histogram.last + 1, -histogram.first)
    while reach > max_bins:
        exponent, reach = exponent + 1, (reach + 1) // 2
    return histogram.coarsened(exponent)


def between(histogram: Histogram, first: int, last: int) -> Counts:
    """Counts of the bins first to last, (last - first + 1,); all of the histogram's are among them."""
    counts = np.zeros(last - first + 1, dtype=np.int64)
    counts[histogram.first - first : histogram.last - first + 1] = histogram.counts
    return counts
