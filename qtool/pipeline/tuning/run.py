"""The command tune: open, try, choose, validate, write."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from tqdm import tqdm

from qtool.config import Config, dump_config
from qtool.config.sections.tuning import AT_GOAL
from qtool.deploy.engine import AUTO
from qtool.pipeline import runs
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.tuning.bench import Bench, MakeBench, Parts
from qtool.pipeline.tuning.opening import inputs_of, open_parts, open_tuning, versions
from qtool.pipeline.tuning.report import candidate_words, line_of
from qtool.pipeline.tuning.result import conclude, goal_of
from qtool.pipeline.tuning.space import config_of
from qtool.search.goals import Goal
from qtool.search.history import Entry, History, open_history
from qtool.search.outcomes import Outcome
from qtool.search.space import CONFIRM, TRIAL, Finding, Proposal
from qtool.search.strategies import STRATEGIES
from qtool.search.tuner import Limits, Measure, Rules, Tuned, Tuner
from qtool.search.workers import Pool, crew_of

LOG = logging.getLogger("qtool")

HISTORY_FILE = "tuning.db"


def tune(config: Config) -> tuple[runs.Outcome, bool]:
    """Tune a network to an accuracy goal; also whether the goal is met.

    Raises:
        QtoolError: if it cannot be done as asked.
    """
    opened = open_tuning(config)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", opened.subject.arch, opened.subject.weights)
        path = config.tuning.history or folder / HISTORY_FILE
        with open_history(path, inputs_of(opened)) as history:
            LOG.info("a tuning that is ended can go on: repeat the command with --history %s", path)
            if history.taken:
                LOG.info("%d results are taken over", history.taken)
            parts = open_parts(opened, history, folder)
            bench = Bench(parts)
            history.put_fact("goal", _goal_fact(config, bench))
            tuned = _tuned(config, parts, bench, history)
            return conclude(config, opened, bench, history, tuned, folder)


def _goal_fact(config: Config, bench: Bench) -> dict[str, object]:
    """What `qtool tune history` needs to judge the trials."""
    asked, values = config.tuning, bench.float_result.as_dict()
    goal = {"metric": asked.goal_metric, "max_drop": asked.max_drop, "relative": asked.relative_drop}
    start = dict(bench.parts.space.space.start.settings)
    return goal | {"float": values[asked.goal_metric], "objective": asked.objective, "start": start}


def _tuned(config: Config, parts: Parts, bench: Bench, history: History) -> Tuned:
    """Run the strategy."""
    asked, goal = config.tuning, goal_of(config)
    float_value = float(bench.float_result.as_dict()[asked.goal_metric])
    engine = config.evaluation.engine
    rules = Rules(
        goal, float_value, asked.objective, None if engine == AUTO else engine, config.run.seed, versions()
    )
    limits = Limits(asked.max_trials, asked.time_limit or None, asked.stop_at == AT_GOAL)
    start = dict(parts.space.space.start.settings)
    LOG.info("goal: %s", goal_words(goal, float_value))

    def tell(entry: Entry, finding: Finding) -> None:
        bar.update()
        bar.set_postfix_str(entry.proposal.stage)
        what = candidate_words(entry.proposal.candidate, start)
        if entry.proposal.kind in (TRIAL, CONFIRM):
            LOG.info("%s", line_of(entry, finding, goal, float_value, what))
        else:
            LOG.debug("%s %d: %s: %s", entry.proposal.kind, entry.number, what, entry.outcome.values)

    with (
        _measuring(config, parts, bench, history) as measure,
        tqdm(desc="tuning", unit="measured", leave=False, disable=None) as bar,
    ):
        tuner = Tuner(
            rules,
            limits,
            history,
            measure,
            tell,
            lambda p: dump_config(config_of(config, p.candidate, parts.space)),
        )
        return tuner.run(STRATEGIES[asked.strategy](parts.space.space, config.run.seed))


def goal_words(goal: Goal, float_value: float) -> str:
    """The goal, and the value at which it is met."""
    side = "at most" if goal.metric == "loss" else "at least"
    return f"{goal.words()}: {goal.metric} {side} {goal.target(float_value):.4f}, float {float_value:.4f}"


@contextmanager
def _measuring(config: Config, parts: Parts, bench: Bench, history: History) -> Iterator[Measure]:
    """What measures proposals: this process, others, or a cluster."""
    crew = crew_of(config.tuning.trial_workers, MakeBench(config, parts.space, history.files()))
    if crew is None:
        yield lambda proposals: _one_by_one(bench, proposals)
        return
    LOG.info("%d workers", crew.size)
    with closing(crew):
        yield Pool(crew).run


def _one_by_one(bench: Bench, proposals: Sequence[Proposal]) -> Generator[Outcome, None, None]:
    for proposal in proposals:
        with quietly():
            outcome = bench(proposal)
        yield outcome


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what a trial says for the log of the run; warnings are said."""

    def lower(record: logging.LogRecord) -> bool:
        if record.levelno == logging.INFO:
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return True

    LOG.addFilter(lower)
    try:
        yield
    finally:
        LOG.removeFilter(lower)
