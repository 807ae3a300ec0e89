"""How much of a search is done, and about how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What a line search of Powell's method takes, until some have been seen.
TYPICAL_EVALUATIONS = 12.0


@dataclass(frozen=True)
class Pace:
    """Where Powell's method is: an iteration is one line search for each number of the vector.

    Args:
        iteration: counted from 1.
        line: which line search of the iteration, counted from 0.
        lines: that have ended, in all iterations.
        evaluations: of the loss in all iterations.
    """

    iteration: int = 1
    line: int = 0
    lines: int = 0
    evaluations: int = 0


class PaceKeeper:
    """Finds out where Powell's method is, from the vectors that it tries.

    A line search moves along one direction; numbers that move together for the first time start the next
    one. Behind the first iteration a direction may be one of several numbers, and the count is off by one
    or two.

    Args:
        size: of a vector.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pace = Pace()
        self._last: NDArray[np.float64] | None = None
        self._direction: frozenset[int] = frozenset()

    def start_iteration(self) -> None:
        """Tell that the next vector belongs to another iteration."""
        at = self.pace
        self.pace = Pace(at.iteration + 1, 0, at.lines + 1, at.evaluations)
        self._direction = frozenset()

    def see(self, vector: NDArray[np.float64], is_new: bool) -> None:
        """Take note of a vector that the method asks for; a new one is evaluated."""
        at = self.pace
        line, lines = at.line, at.lines
        before = vector if self._last is None else self._last
        moved = frozenset(np.flatnonzero(vector != before).tolist())
        self._last = vector.copy()
        if moved and moved != self._direction:
            if self._direction:
                line, lines = min(line + 1, self.size - 1), lines + 1
            # The first step of a line search also sets the number before to its best.
            self._direction = (moved - self._direction) or moved
        self.pace = Pace(at.iteration, line, lines, at.evaluations + is_new)


def seconds_left(
    pace: Pace, seconds: Sequence[float], maxiter: int | None, maxfev: int | None
) -> float | None:
    """About how long Powell's method takes until its limits; it may find earlier that it is done.

    Args:
        pace: where it is.
        seconds: that a trial takes in the line search of each number.
        maxiter, maxfev: limits of its iterations and of its evaluations.

    Returns:
        None if there is no limit.

    Example:
        >>> pace = Pace(iteration=1, line=1, lines=1, evaluations=15)
        >>> seconds_left(pace, [3.0, 2.0, 1.0], maxiter=1, maxfev=None)  # half of line 1, and line 2
        20.0
        >>> seconds_left(pace, [3.0, 2.0, 1.0], maxiter=None, maxfev=18)
        6.0
    """
    per_line = pace.evaluations / (pace.lines + 0.5) if pace.lines else TYPICAL_EVALUATIONS
    limits = []
    if maxiter is not None:
        this = seconds[pace.line] / 2 + sum(seconds[pace.line + 1 :])
        limits.append(per_line * (this + (maxiter - pace.iteration) * sum(seconds)))
    if maxfev is not None:
        limits.append((maxfev - pace.evaluations) * float(np.mean(seconds)))
    return min(limits, default=None)
