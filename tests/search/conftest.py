"""A tuning whose measurements are a table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtool.search.goals import Goal
from qtool.search.history import open_history
from qtool.search.outcomes import Outcome
from qtool.search.space import CONFIRM, TRIAL, Candidate, Proposal, Space
from qtool.search.strategies import STRATEGIES
from qtool.search.tuner import Limits, Rules, Tuned, Tuner

FLOAT_TOP1 = 70.0


class Fake:
    """Measures by functions of a candidate, and notes what it was asked.

    Args:
        top1: of a candidate.
        error: of the logits of a candidate; 70 minus its top-1 unless said otherwise.
        costs: by candidate, between 0 and 1.
    """

    def __init__(
        self,
        top1: Callable[[Candidate], float],
        error: Callable[[Candidate], float] | None = None,
        cost: Callable[[Candidate], float] = lambda candidate: 0.25 + 0.01 * len(candidate.raised),
        confirmed: Callable[[Candidate], float] | None = None,
    ) -> None:
        self.top1, self.cost = top1, cost
        self.error = error or (lambda candidate: FLOAT_TOP1 - top1(candidate))
        self.confirmed = confirmed or top1
        self.asked: list[Proposal] = []

    def __call__(self, proposals: Sequence[Proposal]) -> Generator[Outcome, None, None]:
        for proposal in proposals:
            self.asked.append(proposal)
            yield self._outcome(proposal)

    def _outcome(self, proposal: Proposal) -> Outcome:
        candidate = proposal.candidate
        if proposal.kind not in (TRIAL, CONFIRM):
            return Outcome({"error": self.error(candidate)}, 0.5)
        top1 = (self.confirmed if proposal.kind == CONFIRM else self.top1)(candidate)
        if top1 != top1:
            return Outcome({}, 0.1, "refused")
        values = {"top1": top1, "size_share": self.cost(candidate), "worst": [3, 1]}
        return Outcome(values, 1.0)

    @property
    def trials(self) -> list[Candidate]:
        """What was asked in full, in order."""
        return [p.candidate for p in self.asked if p.kind == TRIAL]

    @property
    def raised(self) -> list[str]:
        """Of each trial, the groups that have more bits."""
        return ["+".join(f"{g}:{b}" if b else g for g, b in c.raised) for c in self.trials]

    def settings(self, *names: str) -> list[tuple[Any, ...]]:
        """Of each trial, some settings."""
        return [tuple(dict(c.settings)[n] for n in names) for c in self.trials]


def _by_groups(table: Mapping[str, float]) -> Callable[[Candidate], float]:
    """The top-1 of a set of groups in float, `a+b`; what is not in the table has that of the start, ``."""
    return lambda candidate: table.get("+".join(name for name, _ in candidate.raised), table[""])


Tune = Callable[..., Tuned]


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    """Run a strategy on a table: tune("basic", space, fake, max_drop=0.5, trials=10)."""

    def run(
        strategy: str,
        space: Space,
        fake: Fake,
        max_drop: float = 0.5,
        limits: Limits | None = None,
        file: str = "tuning.db",
        objective: str = "size",
        confirm: str | None = None,
        clock: Iterable[float] | None = None,
    ) -> Tuned:
        rules = Rules(Goal(max_drop=max_drop), FLOAT_TOP1, objective, confirm)
        ticks = iter(clock) if clock is not None else None
        with open_history(tmp_path / file, {"network": "fake"}) as history:
            now = (lambda: next(ticks)) if ticks is not None else (lambda: 0.0)
            tuner = Tuner(rules, limits or Limits(), history, fake, clock=now)
            return tuner.run(STRATEGIES[strategy](space, 0))

    return run


@pytest.fixture
def make_fake() -> type[Fake]:
    return Fake


@pytest.fixture
def by_groups() -> Callable[[Mapping[str, float]], Callable[[Candidate], float]]:
    return _by_groups
