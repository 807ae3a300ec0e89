"""Which bits each tensor gets: the least damage that a budget allows, by integer programming.

The damage of several tensors is taken to be the sum of that of each alone, and so is most of the cost. What
multiplies two tensors costs their bits multiplied, which is made linear exactly: for the choices x of
one and a of the other, a matrix y of shares with the row sums x and the column sums a has, where these
choose one option each, its one entry at that pair.

Reference:
    Dong et al. 2020, HAWQ-V2, arXiv:1911.03852; Nagel et al. 2023, arXiv:2302.05397.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

# HiGHS keeps constraints up to 1e-6 of their size; what is beyond the budget is searched for again.
TRIES = 5
# Damages below this share of the largest are not told apart.
SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Knob:
    """A tensor whose bits are to be chosen.

    Args:
        name: of the tensor.
        bits: the options.
        damage: of each option, 0 or more.
        cost: of each option, 0 or more, and more with more bits; () for none of its own.
    """

    name: str
    bits: tuple[int, ...]
    damage: tuple[float, ...]
    cost: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        wrong = (
            not self.bits or len(self.damage) != len(self.bits) or len(self.cost) not in (0, len(self.bits))
        )
        if wrong or not all(math.isfinite(v) and v >= 0 for v in (*self.damage, *self.cost)):
            raise ValueError(f"knob {self.name!r}: a finite damage and cost for each option is wanted")
        by_bits = [cost for _, cost in sorted(zip(self.bits, self.cost, strict=False))]
        if by_bits != sorted(by_bits):
            raise ValueError(f"knob {self.name!r}: more bits cost less")


@dataclass(frozen=True)
class Product:
    """What costs the bits of two tensors, multiplied, for each of count operations."""

    first: str
    second: str
    count: float


@dataclass(frozen=True)
class Choice:
    """Bits for every tensor.

    Args:
        bits: by name.
        damage, cost: of all together.
    """

    bits: Mapping[str, int]
    damage: float
    cost: float


class BudgetTooSmall(ValueError):
    """Not even the cheapest options fit.

    Attributes:
        smallest: the least budget that has a solution.
    """

    def __init__(self, smallest: float) -> None:
        super().__init__(f"the budget is too small; the cheapest choice costs {smallest:g}")
        self.smallest = smallest


def price(
    knobs: Sequence[Knob], products: Sequence[Product], bits: Mapping[str, int], fixed: float = 0.0
) -> Choice:
    """What a choice of bits costs and harms."""
    damage, cost = 0.0, fixed
    for knob in knobs:
        number = knob.bits.index(bits[knob.name])
        damage += knob.damage[number]
        cost += knob.cost[number] if knob.cost else 0.0
    cost += sum(p.count * bits[p.first] * bits[p.second] for p in products)
    return Choice(dict(bits), damage, cost)


def extremes(
    knobs: Sequence[Knob], products: Sequence[Product] = (), fixed: float = 0.0
) -> tuple[Choice, Choice]:
    """The cheapest choice, and the one of the most bits everywhere."""
    low = {knob.name: min(zip(knob.cost or knob.bits, knob.bits, strict=True))[1] for knob in knobs}
    high = {knob.name: max(knob.bits) for knob in knobs}
    return price(knobs, products, low, fixed), price(knobs, products, high, fixed)


def choose_bits(
    knobs: Sequence[Knob], budget: float, products: Sequence[Product] = (), fixed: float = 0.0
) -> Choice:
    """The choice of the least damage whose cost is within the budget.

    Args:
        knobs: the tensors.
        budget: what all may cost.
        products: what costs bits multiplied; both tensors are knobs.
        fixed: what is spent anyway.

    Raises:
        BudgetTooSmall: if no choice is within the budget.
        ValueError: if a product names no knob.
    """
    names = {knob.name for knob in knobs}
    strangers = [p for p in products if not {p.first, p.second} <= names]
    if strangers:
        raise ValueError(f"no knob is called {strangers[0].first!r} or {strangers[0].second!r}")
    cheapest, _ = extremes(knobs, products, fixed)
    if cheapest.cost > budget:
        raise BudgetTooSmall(cheapest.cost)
    allowed = budget
    for _ in range(TRIES):
        found = _solve(knobs, allowed - fixed, products, cheapest.cost - fixed)
        choice = price(knobs, products, found or cheapest.bits, fixed)
        if choice.cost <= budget:
            return choice if choice.damage <= cheapest.damage else cheapest
        allowed -= 2 * (choice.cost - budget)
    return cheapest


def _solve(
    knobs: Sequence[Knob], budget: float, products: Sequence[Product], cheapest: float
) -> dict[str, int] | None:
    """The bits of each knob, up to the solver's tolerance; None if it finds none."""
    if budget < cheapest:
        return None
    program = _Program(knobs, products)
    with _silent():
        result = milp(
            program.damage,
            integrality=program.integral,
            bounds=Bounds(0, 1),
            constraints=program.constraints(budget),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    return {
        knob.name: knob.bits[int(np.argmax(result.x[start : start + len(knob.bits)]))]
        for knob, start in zip(knobs, program.starts, strict=True)
    }


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, nothing reaches stdout: HiGHS now and then prints a line there, whatever it is told."""
    try:
        stdout = os.dup(1)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        sys.stdout.flush()
        os.dup2(nowhere, 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C has not written yet
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


class _Program:
    """The integer program: a variable for each option, and for each pair of options of a product."""

    def __init__(self, knobs: Sequence[Knob], products: Sequence[Product]) -> None:
        self.starts: list[int] = []
        self.rows: list[tuple[list[int], list[float], float]] = []  # columns, factors, right-hand side
        costs: list[float] = []
        damages: list[float] = []
        for knob in knobs:
            self.starts.append(len(costs))
            self.rows.append(
                (list(range(len(costs), len(costs) + len(knob.bits))), [1.0] * len(knob.bits), 1.0)
            )
            costs += knob.cost or [0.0] * len(knob.bits)
            damages += knob.damage
        chosen = len(costs)
        place = {knob.name: number for number, knob in enumerate(knobs)}
        for product in products:
            costs += self._pairs(product, knobs, place, len(costs))
        self.costs = np.array(costs)
        # The solver stops within 1e-6 of the best: damages are scaled so that this is a share of the whole.
        least, most = sum(min(knob.damage) for knob in knobs), max(damages, default=0.0)
        scale = max(least, SMALLEST_SHARE * most) or 1.0
        self.damage = np.array(damages + [0.0] * (len(costs) - chosen)) / scale
        self.integral = np.array([1] * chosen + [0] * (len(costs) - chosen))

    def _pairs(
        self, product: Product, knobs: Sequence[Knob], place: Mapping[str, int], start: int
    ) -> list[float]:
        """Shares of each pair of options: rows sum to the one knob's choice, columns to the other's."""
        first, second = place[product.first], place[product.second]
        rows, columns = knobs[first].bits, knobs[second].bits
        for number in range(len(rows)):
            cells = [start + number * len(columns) + other for other in range(len(columns))]
            self._equal(cells, self.starts[first] + number)
        for other in range(len(columns)):
            cells = [start + number * len(columns) + other for number in range(len(rows))]
            self._equal(cells, self.starts[second] + other)
        return [product.count * a * b for a in rows for b in columns]

    def _equal(self, cells: list[int], choice: int) -> None:
        self.rows.append(([*cells, choice], [1.0] * len(cells) + [-1.0], 0.0))

    def constraints(self, budget: float) -> list[LinearConstraint]:
        """One option each, pairs that fit, and the budget, which is scaled to 1."""
        entries = [
            (row, c, f) for row, (cs, fs, _) in enumerate(self.rows) for c, f in zip(cs, fs, strict=True)
        ]
        numbers, columns, factors = zip(*entries, strict=True)
        shape = (len(self.rows), len(self.costs))
        matrix = coo_array((factors, (numbers, columns)), shape=shape).tocsr()
        wanted = [value for *_, value in self.rows]
        largest = budget or 1.0
        spent = coo_array((self.costs / largest).reshape(1, -1)).tocsr()
        return [LinearConstraint(matrix, wanted, wanted), LinearConstraint(spent, -np.inf, budget / largest)]


def pareto_front(
    knobs: Sequence[Knob], products: Sequence[Product] = (), fixed: float = 0.0, count: int = 24
) -> list[Choice]:
    """The best choices for budgets from the cheapest to the dearest, those of no use left out.

    Args:
        knobs, products, fixed: as for choose_bits.
        count: how many budgets.

    Returns:
        By rising cost and falling damage.
    """
    low, high = extremes(knobs, products, fixed)
    budgets = np.linspace(low.cost, high.cost, count)
    found: list[Choice] = []
    for budget in budgets:
        choice = choose_bits(knobs, max(float(budget), low.cost), products, fixed)
        if not found or (choice.damage < found[-1].damage and choice.cost > found[-1].cost):
            found.append(choice)
    return found
