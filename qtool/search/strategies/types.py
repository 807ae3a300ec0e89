"""What a strategy is made of."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from qtool.search.space import Finding, Proposal, Space, trial

Result = TypeVar("Result")
# Proposes, is sent findings, and gives something at its end.
Part = Generator[Sequence[Proposal], Sequence[Finding], Result]
Steps = Part[None]


def one(proposal: Proposal) -> Part[Finding]:
    """Propose one alone."""
    (found,) = yield [proposal]
    return found


def start(space: Space) -> Part[Finding]:
    """The trial that every strategy begins with."""
    return (yield from one(trial(space.start, "start")))
