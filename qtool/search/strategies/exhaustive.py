"""Everything, one after the other, made as it is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from qtool.search.space import Candidate, Proposal, Space, trial
from qtool.search.strategies.types import Steps, start

BATCH = 8


def exhaustive(space: Space, seed: int) -> Steps:
    """Propose every combination of settings with all groups quantized, then with one raised, then two, ...

    Args:
        space: what there is to choose from.
        seed: not used, as nothing is drawn.
    """
    yield from start(space)
    proposals = itertools.islice(_all(space), 1, None)  # behind the start
    while batch := list(itertools.islice(proposals, BATCH)):
        yield batch


def _all(space: Space) -> Iterator[Proposal]:
    names = [d.name for d in space.dimensions]
    for count in range(len(space.groups) + 1):
        for groups in itertools.combinations(space.groups, count):
            for bits in itertools.product(space.fallback, repeat=count):
                raised = dict(zip(groups, bits, strict=True))
                for chosen in itertools.product(*(d.options for d in space.dimensions)):
                    settings = dict(zip(names, chosen, strict=True))
                    yield trial(Candidate.of(settings, raised), f"{count} groups raised")
