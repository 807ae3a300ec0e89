"""How far a method is among its layers or blocks, and about how long the rest takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a method is.

    Args:
        name: of the layer or block that is next, or at work.
        number: of it, counted from 1.
        of: how many there are.
        seconds: since the start.
        seconds_left: estimated from the work done so far; None while nothing was measured.
    """

    name: str
    number: int
    of: int
    seconds: float
    seconds_left: float | None


ShowProgress = Callable[[Progress], None]


class Meter:
    """Measures work that comes in parts of known relative size.

    What was read from a store took no time, and says nothing about the rest: see skip.

    Args:
        parts: (name, work) of each part; the units of work do not matter.
        show: is told of every step; None for nobody.
        clock: gives seconds.

    Example:
        >>> seen, now = [], iter([0.0, 0.0, 3.0])
        >>> meter = Meter([("a", 1.0), ("b", 2.0)], seen.append, lambda: next(now))
        >>> meter.start(); meter.done(); seen[-1].name, seen[-1].seconds_left
        ('b', 6.0)
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, float]],
        show: ShowProgress | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._parts = parts
        self._show = show
        self._clock = clock
        self._began = clock()
        self._place = 0
        self._measured = 0.0  # work
        self._spent = 0.0  # seconds for it
        self._part_began = self._began

    def start(self) -> None:
        """The next part begins."""
        self._part_began = self._clock()
        self._tell(0.0, self._part_began)

    def within(self, share: float) -> None:
        """A share of the part is done, 0 to 1."""
        self._tell(share, self._clock())

    def done(self) -> None:
        """The part is done; the next one is up."""
        now = self._clock()
        self._measured += self._parts[self._place][1]
        self._spent += now - self._part_began
        self._advance(now)

    def skip(self) -> None:
        """The part needs no work."""
        self._advance(self._clock())

    def _advance(self, now: float) -> None:
        self._place += 1
        self._part_began = now
        if self._place < len(self._parts):
            self._tell(0.0, now)

    def _tell(self, share: float, now: float) -> None:
        if self._show is None:
            return
        here = self._parts[self._place][1] * share
        measured, spent = self._measured + here, self._spent + (now - self._part_began) * (share > 0)
        rest = sum(work for _, work in self._parts[self._place :]) - here
        left = rest * spent / measured if measured > 0 else None
        name = self._parts[self._place][0]
        self._show(Progress(name, self._place + 1, len(self._parts), now - self._began, left))
