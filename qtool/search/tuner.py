"""The loop of a tuning: ask the strategy, measure what is not known yet, tell it what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Protocol

from qtool.search.goals import Goal
from qtool.search.history import Entry, History
from qtool.search.outcomes import Outcome, finding_of
from qtool.search.space import CONFIRM, TRIAL, Finding, Proposal
from qtool.search.strategies import Steps

# Batches in a row of which every proposal was known: the strategy goes in circles.
MOST_REPEATS = 100


class Measure(Protocol):
    """Measures proposals that do not depend on one another, and gives the outcomes in their order."""

    def __call__(self, proposals: Sequence[Proposal], /) -> Generator[Outcome, None, None]: ...


@dataclass(frozen=True)
class Limits:
    """When a tuning ends.

    Args:
        trials: after so many trials; probes do not count.
        seconds: no trial begins later than this; None or 0 for no limit.
        at_goal: whether it ends with the first trial that meets the goal, or goes on to find a cheaper one.
    """

    trials: int = 100
    seconds: float | None = None
    at_goal: bool = True


@dataclass(frozen=True)
class Rules:
    """What a tuning is about.

    Args:
        goal: the accuracy to keep.
        float_value: the goal's metric of the float network on the images that choose.
        objective: what to choose by among those that meet the goal.
        confirm: the engine that has to find that one meets it, if need be in a second turn; None for any.
        seed: stored with every trial.
        versions: likewise.
    """

    goal: Goal
    float_value: float
    objective: str = "size"
    confirm: str | None = None
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """How a tuning ended.

    Args:
        best: the cheapest that meets the goal; if none does, the one with the highest score.
        met: whether it meets the goal.
        trials: how many were made or taken over, probes left out.
        why: it ended, in words.
    """

    best: Entry | None
    met: bool
    trials: int
    why: str


class Tuner:
    """Runs a strategy.

    Args:
        rules, limits: of the tuning.
        history: takes what is measured, and gives what is known.
        measure: measures the rest.
        tell: is given every entry and its finding, when it is there.
        settings: of a run that does what is proposed, as text, for the history.
        clock: seconds.
    """

    def __init__(
        self,
        rules: Rules,
        limits: Limits,
        history: History,
        measure: Measure,
        tell: Callable[[Entry, Finding], object] = lambda entry, finding: None,
        settings: Callable[[Proposal], str] = lambda proposal: "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules, self.limits, self.history = rules, limits, history
        self._measure, self._tell, self._settings, self._clock = measure, tell, settings, clock
        self._start = clock()
        self._tried: dict[str, tuple[Entry, Finding]] = {}

    def run(self, strategy: Steps) -> Tuned:
        """Ask, measure and tell until the goal is met, a limit is reached, or nothing is left to try."""
        repeats = 0
        batch = next(strategy, None)
        while batch is not None:
            before = len(self._tried)
            findings, why = self._findings(list(batch))
            if why:
                strategy.close()
                return self._ended(why)
            repeats = 0 if len(self._tried) > before else repeats + 1
            if repeats > MOST_REPEATS:
                return self._ended("the strategy proposes nothing new")
            try:
                batch = strategy.send(findings)
            except StopIteration:
                batch = None
        return self._ended("the strategy has tried all that it has")

    def _findings(self, batch: list[Proposal]) -> tuple[list[Finding], str]:
        """What was found of a batch, and why the tuning ends, or ""."""
        found: list[Finding] = []
        # Closed at the end, so that what is measured ahead by other processes stops.
        with closing(self._measure(self._to_measure(batch))) as outcomes:
            for proposal in batch:
                why = self._limit(proposal)
                if why:
                    return found, why
                finding = self._finding(proposal, outcomes)
                found.append(finding)
                if finding.met and proposal.kind == TRIAL and self.limits.at_goal:
                    return found, "the goal is met"
        return found, ""

    def _to_measure(self, batch: Sequence[Proposal]) -> list[Proposal]:
        """What is not known yet, up to the limit of trials, each once."""
        unknown = {p.key: p for p in batch if self.history.find(p) is None}
        left = self.limits.trials - self._trials()
        known = {p.key for p in batch if p.kind == TRIAL} - unknown.keys() - self._tried.keys()
        trials = [p for p in unknown.values() if p.kind == TRIAL][: max(0, left - len(known))]
        return [p for p in unknown.values() if p.kind != TRIAL or p in trials]

    def _limit(self, proposal: Proposal) -> str:
        limits, new = self.limits, proposal.key not in self._tried
        if limits.seconds and self._clock() - self._start >= limits.seconds:
            return f"the time limit, --timeout {limits.seconds:g}, was reached"
        if new and proposal.kind == TRIAL and self._trials() >= limits.trials:
            return f"the limit of trials, --max-trials {limits.trials}, was reached"
        return ""

    def _trials(self) -> int:
        return sum(entry.proposal.kind == TRIAL for entry, _ in self._tried.values())

    def _finding(self, proposal: Proposal, outcomes: Iterator[Outcome]) -> Finding:
        """Of one proposal: what is known, else the next outcome."""
        if proposal.key in self._tried:
            return replace(self._tried[proposal.key][1], proposal=proposal)
        known = self.history.find(proposal)
        entry = known or self._add(proposal, next(outcomes))
        finding = self._judged(proposal, entry.outcome)
        self._tell(entry, finding)
        if finding.met and proposal.kind == TRIAL and self._is_to_be_confirmed(entry):
            finding = self._confirmed(finding)
        self._tried[proposal.key] = entry, finding
        return finding

    def _is_to_be_confirmed(self, entry: Entry) -> bool:
        engine = self.rules.confirm
        return engine is not None and entry.outcome.values.get("engine") != engine

    def _confirmed(self, finding: Finding) -> Finding:
        """What the engine that was asked for makes of a trial that meets the goal."""
        again = Proposal(finding.candidate, CONFIRM, (), finding.proposal.stage)
        known = self.history.find(again)
        if known is None:
            with closing(self._measure([again])) as outcomes:
                known = self._add(again, next(outcomes))
        entry = known
        confirmed = self._judged(again, entry.outcome)
        self._tell(entry, confirmed)
        return replace(finding, score=confirmed.score, met=confirmed.met)

    def _add(self, proposal: Proposal, outcome: Outcome) -> Entry:
        rules = self.rules
        return self.history.add(proposal, outcome, self._settings(proposal), rules.seed, rules.versions)

    def _judged(self, proposal: Proposal, outcome: Outcome) -> Finding:
        rules = self.rules
        return finding_of(proposal, outcome, rules.goal, rules.float_value, rules.objective)

    def _ended(self, why: str) -> Tuned:
        trials = [(e, f) for e, f in self._tried.values() if e.proposal.kind == TRIAL]
        passing = [(e, f) for e, f in trials if f.met]
        ranked = sorted(
            passing or [(e, f) for e, f in trials if not e.outcome.failure],
            key=(lambda pair: (pair[1].cost, -pair[1].score))
            if passing
            else (lambda pair: (-pair[1].score, pair[1].cost)),
        )
        return Tuned(ranked[0][0] if ranked else None, bool(passing), len(trials), why)
