"""Random draws: each proposal by itself, none twice, and never the whole product in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

from qtool.search.space import Candidate, Space, trial
from qtool.search.strategies.types import Steps, start

BATCH = 8
# Draws in a row that bring nothing new: then there is next to nothing left.
MOST_REPEATS = 1000


def random_draws(space: Space, seed: int) -> Steps:
    """Propose candidates drawn by seed: settings from all their options, and of groups a share.

    Half of the draws leave all groups as they are.

    Args:
        space: what there is to choose from.
        seed: of the draws.
    """
    yield from start(space)
    new = _draws(space, random.Random(seed))
    while batch := [trial(candidate, "draw") for _, candidate in zip(range(BATCH), new, strict=False)]:
        yield batch


def _draws(space: Space, generator: random.Random) -> Iterator[Candidate]:
    seen = {space.start}
    repeats = 0
    while repeats < MOST_REPEATS:
        candidate = _draw(space, generator)
        if candidate in seen:
            repeats += 1
            continue
        seen.add(candidate)
        repeats = 0
        yield candidate


def _draw(space: Space, generator: random.Random) -> Candidate:
    settings = {d.name: generator.choice(d.options) for d in space.dimensions}
    share = max(0.0, generator.uniform(-1, 1))
    raised = {g: generator.choice(space.fallback) for g in space.groups if generator.random() < share}
    return Candidate.of(settings, raised)
