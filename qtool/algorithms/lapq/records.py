"""How to search, how far a search is, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.algorithms.lapq.pace import Pace
from qtool.numerics.spec import LayerSpec

Specs = Mapping[str, LayerSpec]


@dataclass(frozen=True)
class LapqSpec:
    """How to search.

    Args:
        init_mode: "auto" for the best p, one of P_STARTS, or one of CLIPPED_STARTS.
        init_method: SciPy's name of the method that finds the range of one tensor.
        method: SciPy's name of the method that moves all of them.
        maxiter: limit of its iterations, None for SciPy's own.
        maxfev: limit of its evaluations of the loss, None for no other.
        basinhopping: whether to repeat it from points nearby, chosen at random.
        basinhopping_niter: how often.
        both_ends: whether the ends of an asymmetric range move independently.
        seed: of basinhopping.
    """

    init_mode: str = "auto"
    init_method: str = "Powell"
    method: str = "Powell"
    maxiter: int | None = 2
    maxfev: int | None = None
    basinhopping: bool = False
    basinhopping_niter: int = 100
    both_ends: bool = False
    seed: int = 0


@dataclass(frozen=True)
class LapqState:
    """How far a search is.

    Args:
        phase: what it is doing, in words.
        evaluations: of the loss so far, each point once.
        loss: of the last one.
        best_loss: the smallest so far.
        best: the specs that gave it.
        pace: of the search behind the initialisation, None before it.
    """

    phase: str
    evaluations: int
    loss: float
    best_loss: float
    best: Specs
    pace: Pace | None = None


@dataclass(frozen=True)
class LapqResult:
    """What a search found.

    Args:
        specs: of the smallest loss.
        initial_loss, loss: of the initialisation, and of specs.
        initial: specs of the initialisation.
        p: of the norm that the initialisation minimises, or None.
        losses_of_p: the loss of each p that was tried.
        evaluations: of the loss, each point once.
        tensors: how many ranges were searched.
    """

    specs: Specs
    initial_loss: float
    loss: float
    initial: Specs
    p: float | None
    losses_of_p: Mapping[float, float]
    evaluations: int
    tensors: int
