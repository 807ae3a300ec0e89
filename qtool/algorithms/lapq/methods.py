"""SciPy's methods without derivatives, as LAPQ uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import basinhopping, minimize

Vector = NDArray[np.float64]

# SciPy's stubs do not know methods of one's own.
_minimize: Any = minimize
_basinhopping: Any = basinhopping

# The first step of a search, in octaves. SciPy's own are 1 for Powell, where most steps would be
# beyond the minimum, and too small to leave a plateau for Nelder-Mead.
FIRST_STEP = 0.5


def smallest(
    objective: Callable[[Vector], float],
    start: Vector,
    method: str,
    maxiter: int | None = None,
    callback: Callable[..., None] | None = None,
) -> Vector:
    """Where a method ends that looks for the smallest value of a function.

    Args:
        objective: the function.
        start: where it starts, in octaves.
        method: a key of METHODS.
        maxiter: how many iterations it makes at most, None for SciPy's own limit.
        callback: is called after each iteration.
    """
    options = {} if maxiter is None else {"maxiter": maxiter}
    found = _minimize(objective, start, method=METHODS[method], options=options, callback=callback)
    return np.atleast_1d(found.x)


def hop(
    objective: Callable[[Vector], float],
    start: Vector,
    method: str,
    maxiter: int | None,
    callback: Callable[..., None],
    niter: int,
    seed: int,
) -> None:
    """Repeat smallest from points nearby, niter times; arguments as there."""
    options = {} if maxiter is None else {"maxiter": maxiter}
    _basinhopping(
        objective,
        start,
        niter=niter,
        minimizer_kwargs={"method": METHODS[method], "options": options},
        callback=callback,
        seed=np.random.default_rng(seed),
    )


def _powell(objective: Any, start: Vector, callback: Any, maxiter: int | None = None, **_: Any) -> Any:
    own = {"direc": FIRST_STEP * np.eye(len(start)), "maxiter": maxiter}
    return _minimize(objective, start, method="Powell", options=own, callback=callback)


def _nelder_mead(objective: Any, start: Vector, callback: Any, maxiter: int | None = None, **_: Any) -> Any:
    own = {"initial_simplex": np.vstack([start, start + FIRST_STEP * np.eye(len(start))]), "maxiter": maxiter}
    return _minimize(objective, start, method="Nelder-Mead", options=own, callback=callback)


METHODS: dict[str, Any] = {"Powell": _powell, "Nelder-Mead": _nelder_mead}
