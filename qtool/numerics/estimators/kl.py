"""The range whose integers lose the least information: the Kullback-Leibler search.

For each threshold, the histogram with its tails moved into the outer bins is compared with what is
left of it when the bins are merged into as many levels as the grid has, and each level is spread
again over the bins of it that hold anything.

Reference:
    Migacz 2017, 8-bit inference with TensorRT; MXNet's contrib/quantization. Where they differ: a
    bin counts as filled if it is so after the tails were moved; the bins of a window are spread
    evenly over its levels; the merged distribution is smoothed, and not its counts; of equal
    divergences the lowest threshold wins. The bin at zero, which holds half of what a ReLU gives
    and which every grid represents exactly, counts as one of its neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qtool.numerics.estimators.bins import absolute, between, is_one_sided, limited
from qtool.numerics.histogram import MAX_BINS, Counts, Floats, Histogram
from qtool.numerics.spec import ClipSpec, QuantSpec

Indices = NDArray[np.int64]

# Candidates for the threshold: 128 or more to each doubling.
STEPS = 128
# What the merged distribution has in filled bins of empty levels, as a share of one.
EPSILON = 1e-8


def kl_range(histogram: Histogram, spec: QuantSpec, _clip: ClipSpec | None = None) -> tuple[float, float]:
    """The range of the smallest divergence, symmetric about zero but for the ends of the values.

    Args:
        histogram: of the values.
        spec: the grid; its num_bits and symmetry give the number of levels.

    Returns:
        low <= 0 <= high, units of x; one of them is 0 if all values have one sign.
    """
    h = limited(histogram, MAX_BINS)
    if is_one_sided(h):
        positive = h.first >= 0
        h = absolute(h)
        counts = between(h, 0, max(h.last, 1))
        counts[0] = counts[1]
        ends = _thresholds(h)
        starts = np.zeros_like(ends)
        best = _search(counts, starts, ends, levels_of(spec, one_sided=True))
        reach = float(ends[best] * h.width)
        return (0.0, reach) if positive else (-reach, 0.0)
    reach = max(h.last + 1, -h.first)
    zero = reach if spec.symmetric else -h.first
    counts = between(h, -zero, reach - 1 if spec.symmetric else h.last)
    # Zeros themselves are in the bin above zero. Left there, half of a sparse tensor's mass would
    # make any merging of that bin look worse than clipping all the rest.
    counts[zero] = min(counts[zero], counts[[zero - 1, min(zero + 1, len(counts) - 1)]].max())
    thresholds = _thresholds(absolute(h))
    starts = np.maximum(zero - thresholds, 0)
    ends = np.minimum(zero + thresholds, len(counts))
    best = _search(counts, starts, ends, levels_of(spec, one_sided=False))
    return float((starts[best] - zero) * h.width), float((ends[best] - zero) * h.width)


def _thresholds(magnitudes: Histogram) -> Indices:
    """Numbers of bins behind filled ones, ascending; where bins are filled, 1/STEPS apart or less."""
    found = [magnitudes.last + 1]
    while found[-1] > magnitudes.first + 1:
        found.append(found[-1] - max(1, found[-1] // STEPS))
    # A threshold in a gap clips what the one before the gap does, and wastes levels on the gap.
    filled = magnitudes.first + 1 + np.flatnonzero(magnitudes.counts)
    return np.unique(filled[np.searchsorted(filled, found[::-1], side="right") - 1])


def levels_of(spec: QuantSpec, one_sided: bool) -> int:
    """How many integers a range of the grid has, on one side of zero or on both.

    A symmetric grid of 8 bits has 255 steps between its two ends, each about an integer.

    Example:
        >>> levels_of(QuantSpec(), one_sided=False), levels_of(QuantSpec(), one_sided=True)
        (255, 128)
    """
    if not spec.symmetric or not spec.signed:
        return 1 << spec.num_bits
    return 1 << (spec.num_bits - 1) if one_sided else (1 << spec.num_bits) - 1


def _search(counts: Counts, starts: Indices, ends: Indices, levels: int) -> int:
    """Number of the window with the smallest divergence; the widest if levels suffice for all filled bins."""
    possible = np.flatnonzero(ends - starts >= levels)
    if len(possible) == 0 or np.count_nonzero(counts) <= levels:
        return len(starts) - 1
    found = divergences(counts, starts[possible], ends[possible], levels)
    return int(possible[np.argmin(found)])


def divergences(counts: Counts, starts: Indices, ends: Indices, levels: int) -> Floats:
    """The divergence of each window of a histogram from itself in fewer levels.

    All sums over bins are differences of prefix sums, so a window costs as many steps as it has levels.

    Args:
        counts: (bins,).
        starts: (windows,), the first bin of each.
        ends: (windows,), the bin behind its last; at least levels behind its start.
        levels: how many the bins of a window are merged into.

    Returns:
        (windows,), in nats; infinite where a window is empty.
    """
    total = float(counts.sum())
    filled = np.concatenate([[0], np.cumsum(counts > 0)]).astype(np.float64)
    mass = np.concatenate([[0], np.cumsum(counts)]) / total
    p = counts / total
    entropy = np.concatenate([[0.0], np.cumsum(_x_log_x(p))])
    sizes = (ends - starts)[:, None]
    # Level j has the bins from ceil(j * size / levels) on.
    borders = starts[:, None] + np.ceil(sizes * np.arange(levels + 1) / levels).astype(np.int64)
    level_mass = np.diff(mass[borders], axis=1)  # (windows, levels)
    level_filled = np.diff(filled[borders], axis=1)
    below, above = mass[starts], mass[-1] - mass[ends]
    first, last = p[starts], p[ends - 1]
    level_filled[:, 0] += (first == 0) & (below > 0)
    level_filled[:, -1] += (last == 0) & (above > 0)
    inside = mass[ends] - mass[starts]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = level_mass / (np.maximum(level_filled, 1) * inside[:, None])
        log_q = np.log(q + EPSILON) - np.log1p(EPSILON * level_filled.sum(axis=1))[:, None]
        cross = (level_mass * log_q).sum(axis=1) + below * log_q[:, 0] + above * log_q[:, -1]
    edges = _x_log_x(first + below) - _x_log_x(first) + _x_log_x(last + above) - _x_log_x(last)
    found = entropy[ends] - entropy[starts] + edges - cross
    return np.where(inside > 0, found, np.inf)


def _x_log_x(p: Floats) -> Floats:
    return np.asarray(p * np.log(np.where(p > 0, p, 1.0)))
