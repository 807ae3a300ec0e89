"""The search for all ranges together, from the start that suits the network best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from qtool.algorithms.lapq.methods import Vector, hop, smallest
from qtool.algorithms.lapq.pace import PaceKeeper
from qtool.algorithms.lapq.pnorm import P_STARTS, P_VALUES, parabola_minimum
from qtool.algorithms.lapq.records import LapqResult, LapqSpec, LapqState, Specs
from qtool.algorithms.lapq.tensors import SearchedTensor, split, with_ranges
from qtool.numerics.spec import LayerSpec

# From the name of a computation and the computation to its numbers, computed or remembered.
Memo = Callable[[str, Callable[[], Sequence[float]]], Sequence[float]]


def lapq(
    tensors: Sequence[SearchedTensor],
    specs: Specs,
    loss: Callable[[Specs], float],
    settings: LapqSpec,
    memo: Memo = lambda _key, compute: compute(),
    watch: Callable[[LapqState], None] = lambda _state: None,
) -> LapqResult:
    """Find the ranges of the smallest loss.

    Args:
        tensors: from searched_tensors.
        specs: without clipping.
        loss: of the network quantized by some specs.
        settings: how to search.
        memo: remembers numbers, so that a search that was ended can be repeated quickly.
        watch: is told after every evaluation.
    """
    search = _Search(tensors, specs, loss, memo, watch)
    p: float | None = None
    losses_of_p: dict[float, float] = {}
    start = np.zeros(sum(t.numbers for t in tensors))
    if settings.init_mode in P_STARTS:
        p = P_STARTS[settings.init_mode]
        start = search.ranges_of_p(p, settings.init_method)
    elif settings.init_mode == "auto":
        p, losses_of_p = search.best_p(settings.init_method)
        start = search.ranges_of_p(p, settings.init_method)
    search.phase = "the initialisation"
    initial_loss = search(start)
    search.minimize(start, settings)
    return LapqResult(
        search.best,
        initial_loss,
        search.best_loss,
        search.specs_at(start),
        p,
        losses_of_p,
        len(search.losses),
        len(tensors),
    )


class _Search:
    """Evaluates vectors of octaves, and keeps the best."""

    def __init__(
        self,
        tensors: Sequence[SearchedTensor],
        specs: Specs,
        loss: Callable[[Specs], float],
        memo: Memo,
        watch: Callable[[LapqState], None],
    ) -> None:
        self.tensors, self.specs, self.loss, self.memo, self.watch = tensors, specs, loss, memo, watch
        self.phase = ""
        self.losses: dict[str, float] = {}
        self.most: int | None = None
        self.best: Specs = specs
        self.best_loss = float("inf")
        self.keeper: PaceKeeper | None = None

    def specs_at(self, vector: Vector) -> dict[str, LayerSpec]:
        return with_ranges(self.specs, self.tensors, vector)

    def __call__(self, vector: Vector) -> float:
        asked = [t.asked_at(o) for t, o in zip(self.tensors, split(vector, self.tensors), strict=True)]
        key = hashlib.sha256(repr(asked).encode()).hexdigest()
        is_new = key not in self.losses
        if self.keeper is not None:
            self.keeper.see(vector, is_new)
        if is_new:
            self._evaluate(key, vector)
        return self.losses[key]

    def _evaluate(self, key: str, vector: Vector) -> None:
        if len(self.losses) == self.most:
            raise _Enough
        specs = self.specs_at(vector)
        (loss,) = self.memo(f"loss {key}", lambda: (self.loss(specs),))
        self.losses[key] = loss
        if loss < self.best_loss:
            self.best, self.best_loss = specs, loss
        pace = None if self.keeper is None else self.keeper.pace
        self.watch(LapqState(self.phase, len(self.losses), loss, self.best_loss, self.best, pace))

    def ranges_of_p(self, p: float, method: str) -> Vector:
        """For each tensor alone, the octaves of the smallest error in the p-norm."""
        found: list[float] = []
        for tensor in self.tensors:
            key = f"p {p!r} {tensor.layer} {tensor.part}"
            found += self.memo(key, lambda t=tensor: t.fit(p, method))  # type: ignore[misc]
        return np.array(found)

    def best_p(self, method: str) -> tuple[float, dict[float, float]]:
        """The p whose ranges give the smallest loss, and the losses of all that were tried."""
        losses: dict[float, float] = {}
        for p in P_VALUES:
            self.phase = f"the initialisation with p = {p:.3g}"
            losses[p] = self(self.ranges_of_p(p, method))
        p_fitted = parabola_minimum(list(losses), list(losses.values()))
        if p_fitted is not None:
            self.phase = f"the initialisation with p = {p_fitted:.3g}"
            losses[p_fitted] = self(self.ranges_of_p(p_fitted, method))
        return min(losses, key=lambda p: losses[p]), losses

    def minimize(self, start: Vector, settings: LapqSpec) -> None:
        """Search from a start; what was found is in best and best_loss."""
        keeper = self.keeper = PaceKeeper(len(start))

        def count(*_: Any) -> None:
            keeper.start_iteration()
            self.phase = f"iteration {keeper.pace.iteration}"

        self.phase = "iteration 1"
        # SciPy's own limit counts points that were evaluated before, too.
        self.most = None if settings.maxfev is None else len(self.losses) + settings.maxfev
        with suppress(_Enough):
            if settings.basinhopping:
                niter = settings.basinhopping_niter
                hop(self, start, settings.method, settings.maxiter, count, niter, settings.seed)
            else:
                smallest(self, start, settings.method, settings.maxiter, count)


class _Enough(Exception):
    """The search has made all the evaluations that it may."""
