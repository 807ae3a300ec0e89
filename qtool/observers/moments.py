"""Mean and spread of a chunk of values, and its extremes, from what a scan finds in its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qtool.observers.rows import Extremes, Rows
from qtool.observers.scan import Sums, compiled, row_length, scan

# Elements of which all is computed before the next are touched, so that a CPU reads them from memory once.
TOGETHER = 1 << 19


@dataclass(frozen=True)
class Moments:
    """Of some values: how many, their mean, and the sum of their squared deviations from it."""

    count: int
    mean: float
    squares: float

    @classmethod
    def of_sums(cls, sums: Sums, count: int) -> Moments:
        """From what a scan finds in so many values."""
        parts = [cls(*part) for part in sums.apart]
        in_rows = count - sum(part.count for part in parts)
        if in_rows:
            total = float(sums.sums.cpu().numpy().sum(dtype=np.float64))
            squares = float(np.square(sums.norms.cpu().numpy(), dtype=np.float64).sum())
            parts.append(cls(in_rows, total / in_rows, squares - total**2 / in_rows))
        return parts[0] if len(parts) == 1 else cls.of_all(parts)

    @classmethod
    def of_all(cls, parts: Iterable[Moments]) -> Moments:
        """Those of all parts together; not finite where a part's are not."""
        counts, means, squares = np.array([(p.count, p.mean, p.squares) for p in parts]).T
        with np.errstate(invalid="ignore"):
            mean = float((counts * means).sum() / counts.sum())
            within = float((squares + counts * np.square(means - mean)).sum())
        return cls(int(counts.sum()), mean, within)

    def about(self, pivot: float) -> tuple[float, float]:
        """Sums of x - pivot and of its square."""
        shift = self.mean - pivot
        return self.count * shift, self.squares + self.count * shift**2


@dataclass(frozen=True, eq=False)
class Measured:
    """What there is in a chunk.

    Args:
        extremes: None if they were not wanted.
        moments: of its values.
        clamped: of the values after the clamp; None if there is none.
    """

    extremes: Extremes | None
    moments: Moments
    clamped: Moments | None


def measure(rows: Rows, *, extremes: bool = True, limits: tuple[float, float] | None = None) -> Measured:
    """Measure all values of a chunk.

    Args:
        rows: the chunk.
        extremes: whether they are wanted.
        limits: to which the values are clamped in place once they are taken in.
    """
    values = rows.values
    parts = rows.parts(TOGETHER if values.device.type == "cpu" else values.numel())
    lengths = [row_length(part.numel()) for part in parts]
    low, high, sums, clamped = compiled(scan)(
        parts, lengths, rows.channels_last, extremes, list(limits or ())
    )
    count = values.numel()
    return Measured(
        Extremes.of_rows(low, high, rows.images) if extremes else None,
        Moments.of_sums(sums, count),
        None if limits is None else Moments.of_sums(clamped, count),
    )


def mean_of(x: Tensor) -> float:
    """The mean, the same for every number of threads; 0 where there is none that is finite."""
    if not x.numel():
        return 0.0
    mean = measure(Rows(x.float().reshape(1, 1, -1), False, 1), extremes=False).moments.mean
    return mean if math.isfinite(mean) else 0.0
