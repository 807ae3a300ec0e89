"""The range of the smallest mean squared error, rounding and clipping together.

The error of a range is that of the very grid which the range leads to (affine.qparams_from_range),
over the values of a histogram, taken as spread evenly inside a bin. A search from coarse to fine,
in steps that are powers of two, finds the range: one factor on both ends of a symmetric grid, one
for each end of an asymmetric one.

Reference:
    Choukroun et al. 2019, arXiv:1902.06822; the two ends apart as in MQBench's MSEObserver.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qtool.numerics.histogram import Floats, Histogram
from qtool.numerics.spec import ClipSpec, QuantSpec

# The squared error of grids over [low, high], both (candidates, rows), for ends around zero.
Error = Callable[[Floats, Floats], Floats]

# How far each pass of the search goes from the best so far, and in which steps, in octaves.
OF_HISTOGRAM = ((8.0, 1 / 4), (8.0, 1 / 4), (1.0, 1 / 8), (1 / 8, 1 / 64))
# Levels beyond these lie closer than a histogram's bins; their error is that of even spacing.
MAX_LEVELS = 1 << 12


def mse_range(histogram: Histogram, spec: QuantSpec, _clip: ClipSpec | None = None) -> tuple[float, float]:
    """The range inside that of the histogram whose grid makes the smallest squared error.

    Args:
        histogram: of the values.
        spec: the grid; its axis is not read.

    Returns:
        low <= 0 <= high, units of x; equally far from zero if the grid is symmetric.
    """
    low, high = np.minimum(histogram.edges[:1], 0.0), np.maximum(histogram.edges[-1:], 0.0)
    found = search(
        lambda a, b: histogram_error(histogram, a, b, spec), low, high, spec.symmetric, OF_HISTOGRAM
    )
    return float(found[0][0]), float(found[1][0])


def search(
    error: Error, low: Floats, high: Floats, symmetric: bool, passes: tuple[tuple[float, float], ...]
) -> tuple[Floats, Floats]:
    """The best ranges inside the given ones, one for each row.

    Args:
        error: gives the error of candidates, (candidates, rows).
        low, high: (rows,), low <= 0 <= high.
        symmetric: whether a range has one free end rather than two.
        passes: (reach, step) of each pass, in octaves. The first one moves both ends together from the
            whole range inwards; the others move each end by itself, if the grid is not symmetric.

    Returns:
        low and high, (rows,); of equal errors, those of the wider range.
    """
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    factors = np.zeros((2, len(low)))  # of low and high, in octaves below the whole range

    def improve(ends: list[int], reach: float, step: float) -> None:
        count = round(reach / step)
        offsets = np.arange(count, -count - 1, -1) * step
        tried = np.repeat(factors[:, None], len(offsets), axis=1)  # (2, candidates, rows)
        tried[ends] = np.minimum(tried[ends] + offsets[:, None], 0.0)
        if (factors[ends] == 0).all():  # all of the upper half is the whole range
            tried = tried[:, count:]
        scale = np.exp2(tried)
        best = np.argmin(error(low * scale[0], high * scale[1]), axis=0)
        factors[:] = np.take_along_axis(tried, best[None, None], axis=1)[:, 0]

    for number, (reach, step) in enumerate(passes):
        for ends in [[0, 1]] if symmetric or number == 0 else [[1], [0]]:
            improve(ends, reach, step)
    return low * np.exp2(factors[0]), high * np.exp2(factors[1])


def grid_over(low: Floats, high: Floats, spec: QuantSpec) -> tuple[Floats, Floats, Floats]:
    """The grids that ranges around zero lead to, as affine.qparams_from_range has them.

    Args:
        low, high: any shape.
        spec: the grid asked for.

    Returns:
        scale, and the smallest and largest centered integer, in the shape of low. A range without
        extent has scale 1.
    """
    if spec.symmetric and not spec.signed:
        scale, smallest = high / spec.quant_max, np.zeros_like(high)
    elif spec.symmetric:
        steps = spec.quant_max if spec.narrow_range else (2**spec.num_bits - 1) / 2
        scale = np.maximum(-low, high) / steps
        smallest = np.full_like(scale, spec.quant_min)
    else:
        scale = (high - low) / (2**spec.num_bits - 1)
        smallest = np.rint(low / np.where(scale > 0, scale, 1.0))
    return np.where(scale > 0, scale, 1.0), smallest, smallest + (spec.quant_max - spec.quant_min)


def histogram_error(histogram: Histogram, low: Floats, high: Floats, spec: QuantSpec) -> Floats:
    """Sum of the squared errors of a histogram's values on the grids over [low, high].

    Args:
        histogram: its values are taken as spread evenly inside a bin.
        low, high: (candidates, 1), low <= 0 <= high.
        spec: the grid.

    Returns:
        (candidates, 1), in units of x squared.
    """
    scale, smallest, largest = grid_over(low, high, spec)
    moments = _Moments(histogram)
    if spec.quant_max - spec.quant_min >= MAX_LEVELS:
        return _error_of_fine_steps(moments, scale, smallest * scale, largest * scale)
    # Integer k has the values from (k - 1/2) to (k + 1/2) times scale, and the outer ones all beyond.
    # Summed by parts, sum_k (x - k scale)^2 has one term for each border between two integers.
    k = smallest + np.arange(spec.quant_max - spec.quant_min)  # (candidates, borders)
    count, first, _ = moments.below((k + 0.5) * scale)
    total, sum_x, sum_xx = moments.total()
    sum_kx = largest * sum_x - first.sum(axis=-1, keepdims=True)
    sum_kk = largest**2 * total - ((2 * k + 1) * count).sum(axis=-1, keepdims=True)
    return np.asarray(sum_xx - 2 * scale * sum_kx + scale**2 * sum_kk)


def _error_of_fine_steps(moments: _Moments, scale: Floats, low: Floats, high: Floats) -> Floats:
    """The error of a grid from low to high whose steps are smaller than a bin: inside, scale^2 / 12."""
    total, sum_x, sum_xx = moments.total()
    under, over = moments.below(low), moments.below(high)
    clipped_low = under[2] - 2 * low * under[1] + low**2 * under[0]
    clipped_high = (sum_xx - over[2]) - 2 * high * (sum_x - over[1]) + high**2 * (total - over[0])
    return np.asarray(clipped_low + clipped_high + (over[0] - under[0]) * scale**2 / 12)


class _Moments:
    """Number, sum and sum of squares of a histogram's values below any place."""

    def __init__(self, histogram: Histogram) -> None:
        self.edges, self.counts, self.width = histogram.edges, histogram.counts, histogram.width
        density = self.counts / self.width
        powers = [self.edges**n / n for n in (1, 2, 3)]
        self.count, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(density * np.diff(power))]) for power in powers
        )

    def below(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """The number, the sum and the sum of squares of the values below x, each in its shape."""
        place = np.clip((x - self.edges[0]) / self.width, 0, len(self.counts))
        bin_ = np.minimum(place.astype(np.int64), len(self.counts) - 1)
        part, edge, reach = self.counts[bin_] * (place - bin_), self.edges[bin_], (place - bin_) * self.width
        return (
            self.count[bin_] + part,
            self.first[bin_] + part * (edge + reach / 2),
            self.second[bin_] + part * (edge**2 + edge * reach + reach**2 / 3),
        )

    def total(self) -> tuple[float, float, float]:
        """The number, the sum and the sum of squares of all values."""
        return float(self.count[-1]), float(self.first[-1]), float(self.second[-1])
