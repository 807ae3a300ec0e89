"""Counts of a tensor's values in bins whose width is a power of two.

Bin i holds the values x with floor(x / width) = i, so zero is always an edge. The width is the
smallest power of two for which the values fit into MAX_BINS bins; as it depends on the range
alone, and a wider bin is the union of two narrower ones, the counts are the same however the
values were split, in whatever order they came, and whichever parts were merged first. No count
is ever interpolated or lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts: TypeAlias = "NDArray[np.int64]"
Floats: TypeAlias = "NDArray[np.float64]"

MAX_BINS = 8192
# Bin numbers stay below this, so that arithmetic on them in float32 is exact.
MAX_INDEX = 2**22
# Subnormal numbers apart, float32 spans these powers of two.
MIN_EXPONENT, MAX_EXPONENT = -126, 127
# torch counts in float32, exactly up to 2^24.
MAX_CALL = 2**23


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts in bins of equal width.

    Args:
        exponent: the width of a bin is 2^exponent, in units of x.
        first: number of the first bin; bin i reaches from i * width to (i + 1) * width.
        counts: (bins,), int64; the first and the last are not zero.
    """

    exponent: int
    first: int
    counts: Counts

    @property
    def width(self) -> float:
        """Width of a bin, in units of x."""
        return math.ldexp(1.0, self.exponent)

    @property
    def last(self) -> int:
        """Number of the last bin."""
        return self.first + len(self.counts) - 1

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def edges(self) -> Floats:
        """(bins + 1,): where bins start and end, in units of x."""
        return np.asarray((self.first + np.arange(len(self.counts) + 1)) * self.width, dtype=np.float64)

    @property
    def centers(self) -> Floats:
        """(bins,): the middles of the bins, in units of x."""
        return np.asarray((self.first + np.arange(len(self.counts)) + 0.5) * self.width, dtype=np.float64)

    @classmethod
    def of(cls, x: Tensor) -> Histogram:
        """Count the values of a tensor.

        Args:
            x: any shape, finite floats, not empty.

        Raises:
            ValueError: if x is empty or not finite.

        Example:
            >>> h = Histogram.of(torch.tensor([0.0, 0.5, 0.75, 1.0]))
            >>> h.width == 2**-12, h.total, float(h.edges[0]), int(h.counts[0])
            (True, 4, 0.0, 1)
        """
        if x.numel() == 0:
            raise ValueError("an empty tensor has no histogram")
        flat = x.detach().reshape(-1).float()
        low, high = (float(v) for v in flat.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        exponent, first, last = bins_of_range(low, high)
        factor = math.ldexp(1.0, -exponent)
        bins = last - first + 1
        # The bin numbers are integers, and the limits halves, so no value lies at the edge of a bin.
        counts = torch.zeros(bins, dtype=torch.int64, device=flat.device)
        for part in torch.split(flat, MAX_CALL):
            counts += torch.histc(part.mul(factor).floor_(), bins, first - 0.5, last + 0.5).to(torch.int64)
        return cls(exponent, first, counts.cpu().numpy())

    def coarsened(self, exponent: int) -> Histogram:
        """The same counts in bins of width 2^exponent, which is not below the present one.

        Raises:
            ValueError: if exponent is below the present one.
        """
        shift = exponent - self.exponent
        if shift < 0:
            raise ValueError(f"exponent must be at least {self.exponent}, found {exponent}")
        if shift == 0:
            return self
        shift = min(shift, 62)  # a bin number has fewer digits, so all further shifts do the same
        index = (self.first + np.arange(len(self.counts), dtype=np.int64)) >> shift
        first = int(index[0])
        counts = np.zeros(int(index[-1]) - first + 1, dtype=np.int64)
        np.add.at(counts, index - first, self.counts)
        return Histogram(exponent, first, counts)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both sets of values together."""
        exponent = max(self.exponent, other.exponent)
        while True:
            a, b = self.coarsened(exponent), other.coarsened(exponent)
            first, last = min(a.first, b.first), max(a.last, b.last)
            if last - first < MAX_BINS:
                break
            exponent += 1
        counts = np.zeros(last - first + 1, dtype=np.int64)
        for part in (a, b):
            counts[part.first - first : part.last - first + 1] += part.counts
        return Histogram(exponent, first, counts)

    def clamped(self, low: float, high: float) -> Histogram:
        """The histogram of the values moved into [low, high].

        What lies outside goes into the bin next to the limit, inside it; a bin that a limit cuts stays
        whole. So clamping at zero, which is an edge, is exact.
        """
        inner_first = math.floor(math.ldexp(max(low, self.edges[0]), -self.exponent))
        inner_last = math.ceil(math.ldexp(min(high, self.edges[-1]), -self.exponent)) - 1
        first = min(max(inner_first, self.first), self.last)
        last = max(min(inner_last, self.last), first)
        if inner_first > self.last:  # all values lie below low
            return Histogram(self.exponent, inner_first, np.array([self.total]))
        if inner_last < self.first:
            return Histogram(self.exponent, inner_last, np.array([self.total]))
        counts = self.counts[first - self.first : last - self.first + 1].copy()
        counts[0] += self.counts[: first - self.first].sum()
        counts[-1] += self.counts[last - self.first + 1 :].sum()
        return Histogram(self.exponent, first, counts)

    def rebinned(self, low: float, high: float, bins: int) -> Floats:
        """How many of the values lie in each of some equal bins over [low, high], linear inside a bin.

        What lies outside goes into the first and last bin, as do the ends of bins that a limit cuts;
        with low = high everything goes into the middle one.

        Args:
            low, high: units of x, low <= high.
            bins: number of bins wanted.

        Returns:
            (bins,), float64; the sum is total.

        Example:
            >>> h = Histogram(0, 0, np.array([4, 2]))  # of [0, 1) and [1, 2)
            >>> h.rebinned(0, 2, 4).tolist(), h.rebinned(0.5, 2, 3).tolist()
            ([2.0, 2.0, 1.0, 1.0], [4.0, 1.0, 1.0])
        """
        if not low < high:
            counts = np.zeros(bins)
            counts[bins // 2] = self.total
            return counts
        edges = np.clip(self.edges, low, high)
        cumulated = np.concatenate([[0.0], np.cumsum(self.counts)])
        below = np.interp(np.linspace(low, high, bins + 1), edges, cumulated)
        below[0], below[-1] = 0.0, float(self.total)
        return np.diff(below)

    def total_variation(self, other: Histogram, bins: int = 256) -> float:
        """How far apart two distributions are: half the sum of the differences of their bins' shares.

        Both are coarsened to a common width first, of at most so many bins together: with fewer values in
        a bin, two samples of one distribution would differ by chance alone.

        Returns:
            0 (the same shares) to 1 (no bin in common).

        Example:
            >>> Histogram(0, 0, np.array([1, 1])).total_variation(Histogram(0, 0, np.array([4])))
            0.5
        """
        exponent = max(self.exponent, other.exponent)
        a, b = self.coarsened(exponent), other.coarsened(exponent)
        while max(a.last, b.last) - min(a.first, b.first) >= bins:
            exponent += 1
            a, b = a.coarsened(exponent), b.coarsened(exponent)
        first = min(a.first, b.first)
        shares = np.zeros((2, max(a.last, b.last) - first + 1))
        for row, part in zip(shares, (a, b), strict=True):
            row[part.first - first : part.last - first + 1] = part.counts / part.total
        return float(np.abs(shares[0] - shares[1]).sum() / 2)

    def cdf(self, x: float) -> float:
        """Share of the values below x, linear inside a bin, 0 to 1."""
        cumulated = np.concatenate([[0], np.cumsum(self.counts)])
        return float(np.interp(x, self.edges, cumulated) / self.total)

    def quantile(self, q: float | Floats) -> Floats:
        """The value below which a share q of the values lies, linear inside a bin.

        Args:
            q: 0 to 1, any shape.

        Returns:
            units of x, the shape of q.
        """
        cumulated = np.concatenate([[0], np.cumsum(self.counts)])
        target = np.asarray(q, dtype=np.float64) * self.total
        bin_ = np.minimum(np.searchsorted(cumulated[1:], target, side="left"), len(self.counts) - 1)
        inside = (target - cumulated[bin_]) / self.counts[bin_]
        return np.asarray((self.first + bin_ + inside) * self.width)

    def mean_deviation_moved(self, b: float, start: float, end: float) -> float:
        """Mean absolute deviation from one value, out of that from another.

        E|x - t| has the derivative 2 F(t) - 1, with F the share of values below t. F is the
        histogram's, so the result is off by at most 2 |end - start| times the largest error of F.

        Args:
            b: mean of |x - start|, units of x.
            start, end: units of x.

        Returns:
            mean of |x - end|, units of x.
        """
        return b + 2 * (self._area_below(end) - self._area_below(start)) - (end - start)

    def _area_below(self, t: float) -> float:
        """The integral of the share of values below, from -infinity to t."""
        edges = self.edges
        share = np.concatenate([[0], np.cumsum(self.counts)]) / self.total
        area = np.concatenate([[0], np.cumsum(share[:-1] + share[1:])]) * (self.width / 2)
        if t <= edges[0]:
            return 0.0
        if t >= edges[-1]:
            return float(area[-1] + t - edges[-1])
        i = int((t - edges[0]) / self.width)
        inside = t - edges[i]
        slope = (share[i + 1] - share[i]) / self.width
        return float(area[i] + share[i] * inside + slope * inside**2 / 2)


def bins_of_range(low: float, high: float) -> tuple[int, int, int]:
    """The bins that hold the values from low to high: exponent of the width, first and last bin number."""
    largest = max(abs(low), abs(high))
    exponent = MIN_EXPONENT
    if largest > 0:
        # Both bounds only grow with the range, so the exponent of a union is at least that of its parts.
        spread = max(high - low, largest / MAX_INDEX)
        exponent = max(MIN_EXPONENT, math.frexp(spread / MAX_BINS)[1] - 2)
    while True:
        first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
        if last - first < MAX_BINS and max(abs(first), abs(last)) < MAX_INDEX:
            return exponent, first, last
        exponent += 1
