"""In which order candidates are tried: a strategy proposes, is told what was found, and proposes again.

A strategy is a generator that knows no network. It gives batches of proposals whose members do not depend on
one another, and is sent the findings of each batch in its order. It is deterministic, given the findings,
and its batches do not depend on who evaluates them; so a tuning that was ended goes on where it was, and any
number of workers gives the same trials. Its first batch is the start of the space alone.
"""

from __future__ import annotations

from collections.abc import Callable

from qtool.search.space import Space
from qtool.search.strategies.basic import basic
from qtool.search.strategies.bayesian import bayesian
from qtool.search.strategies.exhaustive import exhaustive
from qtool.search.strategies.greedy_revert import greedy_revert
from qtool.search.strategies.random_draws import random_draws
from qtool.search.strategies.types import Steps

STRATEGIES: dict[str, Callable[[Space, int], Steps]] = {
    "basic": basic,
    "greedy-revert": greedy_revert,
    "bayesian": bayesian,
    "exhaustive": exhaustive,
    "random": random_draws,
}

__all__ = ["STRATEGIES", "Steps"]
