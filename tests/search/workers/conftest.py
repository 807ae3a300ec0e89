"""Crews of each kind; Ray's where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from qtool.search.workers import Crew, LocalCrew, Make, Pool, RayCrew


@pytest.fixture(params=["local", "ray"])
def pool_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Make], Pool]]:
    """A pool of two workers of some kind, by what makes their function."""
    if request.param == "ray":
        pytest.importorskip("ray")
    with ExitStack() as stack:

        def pool(make: Make) -> Pool:
            crew: Crew = LocalCrew(2, make, 1) if request.param == "local" else RayCrew(2, make)
            return Pool(stack.enter_context(closing(crew)))

        yield pool
