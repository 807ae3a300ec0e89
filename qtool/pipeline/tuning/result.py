"""What a tuning leaves: the network that it chose, validated, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from qtool.config import Config, dump_config
from qtool.errors import ConfigError
from qtool.numerics.metrics import top_k_correct
from qtool.pipeline import runs
from qtool.pipeline.engine import engine_record, engine_text, open_engine, verify, write_engine
from qtool.pipeline.passes import evaluate_images
from qtool.pipeline.stats_files import STATS_FILE, save_stats
from qtool.pipeline.tuning.bench import Bench
from qtool.pipeline.tuning.numbers import rows_of
from qtool.pipeline.tuning.opening import Opened
from qtool.pipeline.tuning.report import candidate_words, history_table, rows
from qtool.pipeline.tuning.space import config_of
from qtool.report import Result, compare, table
from qtool.run_dir import write_text
from qtool.search.goals import UNITS, Goal
from qtool.search.history import Entry, History
from qtool.search.space import TRIAL
from qtool.search.tuner import Tuned

TUNED_FILE = "tuned.yaml"
# Trials that the table at the end shows; `qtool tune history` shows all.
SHOWN_TRIALS = 30
COSTS = ("size_bytes", "size_share", "bit_operations_share", "float_macs_share", "latency_ms")


@dataclass(frozen=True)
class Verdict:
    """Whether the goal is met on the images that validate.

    Args:
        met: whether it is.
        drop: in the units of the goal.
        confidence: how likely it is met on all images like these, 0 to 1.
        words: all that, and what limited it.
    """

    met: bool
    drop: float
    confidence: float
    words: str


def conclude(
    config: Config, opened: Opened, bench: Bench, history: History, tuned: Tuned, folder: Path
) -> tuple[runs.Outcome, bool]:
    """Write the network that was chosen, validate it, and say how it ended; also whether the goal is met.

    Raises:
        ConfigError: if no trial could be made.
    """
    best = _best(tuned, history)
    goal = goal_of(config)
    made = bench.make(best.proposal.candidate)
    runs.log_notes(made.model)
    images = bench.held_out if config.tuning.holdout else bench.choosing
    engine = open_engine(config, made.model, images)
    save_stats(made.stats, folder / STATS_FILE)
    runs.write_model(config, folder, opened.subject, opened.traced, made.model, made.specs)
    write_engine(folder, engine)
    results = {
        "float": rows_of(bench.parts.float_result, images.indices),
        "quantized": evaluate_images(config, engine.network, images, "validating"),
    }
    verdict = judge(goal, results["float"], results["quantized"], tuned, best)
    _write_settings(config, bench, best, verdict, folder)
    comparison = compare(results["float"], results["quantized"])
    record = runs.run_record(config, opened.subject, images, results, comparison) | dict(made.record)
    record["engine"] = engine_record(config, engine)
    record["calibration"] = opened.ranges.record
    record["tuning"] = _record(config, tuned, best, verdict, history)
    verified, parity = verify(config, folder, made.model, engine.native, images)
    runs.finish(config, folder, record | parity, images, results)
    lines = [
        _table(goal, history, bench, config.tuning.objective),
        f"{opened.subject.arch}, {images.words}",
        table(results, comparison),
        engine_text(engine),
        verified,
        verdict.words,
        _images_words(bench),
        str(folder / TUNED_FILE),
    ]
    return runs.Outcome("\n".join(filter(None, lines)), folder, record), verdict.met


def goal_of(config: Config) -> Goal:
    """The accuracy that is to be kept."""
    asked = config.tuning
    return Goal(asked.goal_metric, asked.max_drop, asked.relative_drop)


def _best(tuned: Tuned, history: History) -> Entry:
    if tuned.best is not None:
        return tuned.best
    failures = [e.outcome.failure for e in history.entries() if e.outcome.failure]
    reason = f", the first because {failures[0]}" if failures else f": {tuned.why}"
    raise ConfigError(f"tuning: not one of {tuned.trials} trials could be made{reason}")


def _write_settings(config: Config, bench: Bench, best: Entry, verdict: Verdict, folder: Path) -> None:
    winner = config_of(config, best.proposal.candidate, bench.parts.space)
    head = f"# {verdict.words}\n# met: {str(verdict.met).lower()}\n# Use: qtool quantize -c {TUNED_FILE}\n"
    write_text(folder / TUNED_FILE, head + dump_config(winner))


def image_values(metric: str, result: Result) -> Tensor:
    """The metric of each image by itself, (N,): 0 or 100, or its loss."""
    if metric == "loss":
        return F.cross_entropy(result.logits.double(), result.labels, reduction="none")
    return 100 * top_k_correct(result.logits, result.labels, int(metric.removeprefix("top"))).double()


def judge(goal: Goal, float_result: Result, result: Result, tuned: Tuned, best: Entry) -> Verdict:
    """Whether the goal is met, with what confidence, and what limited it.

    Args:
        goal: the accuracy to keep.
        float_result, result: on the images that validate.
        tuned: how the tuning ended.
        best: the trial that is judged.
    """
    float_value, value = (float(r.as_dict()[goal.metric]) for r in (float_result, result))
    drop = goal.drop(float_value, value)
    met = tuned.met and goal.met(float_value, value)
    confidence = goal.confidence(image_values(goal.metric, float_result), image_values(goal.metric, result))
    unit = "%" if goal.relative and float_value else UNITS[goal.metric]
    found = f"drop {drop:.3f}, {goal.max_drop:g} {unit} allowed"
    sure = f"{100 * confidence:.1f} % sure that it is met on images like these {result.images}"
    if met:
        words = f"goal met: {found}; {sure} (trial {best.number}; {tuned.why})"
    elif tuned.met:
        words = f"goal met on the images that chose, but not on those that validate: {found}; {sure}"
    else:
        words = f"goal not met: {found} (the best is trial {best.number}; {tuned.why})"
    return Verdict(met, drop, confidence, words)


def _record(config: Config, tuned: Tuned, best: Entry, verdict: Verdict, history: History) -> dict[str, Any]:
    asked = config.tuning
    return {
        "metric": asked.goal_metric,
        "max_drop": asked.max_drop,
        "relative": asked.relative_drop,
        "met": verdict.met,
        "drop": verdict.drop,
        "confidence": verdict.confidence,
        "ended": tuned.why,
        "strategy": asked.strategy,
        "objective": asked.objective,
        "trials": tuned.trials,
        "best_trial": best.number,
        "candidate": best.proposal.candidate.plain(),
        "costs": {k: v for k, v in best.outcome.values.items() if k in COSTS},
        "taken_over": history.taken,
        "history": str(history.path),
        "holdout": asked.holdout,
    }


def _table(goal: Goal, history: History, bench: Bench, objective: str) -> str:
    """The last trials."""
    float_value = float(bench.float_result.as_dict()[goal.metric])
    start = dict(bench.parts.space.space.start.settings)
    entries = [e for e in history.entries() if e.proposal.kind == TRIAL]
    shown = entries[-SHOWN_TRIALS:]
    words = [candidate_words(e.proposal.candidate, start) for e in shown]
    left = len(entries) - len(shown)
    more = f"{left} earlier trials: qtool tune history {history.path}\n" if left else ""
    return more + history_table(rows(shown, goal, float_value, objective), words)


def _images_words(bench: Bench) -> str:
    """Which images chose and which validated, as the former flatter."""
    chose = len(bench.choosing.indices)
    if bench.held_out.indices:
        return f"chosen on {chose} evaluation images, validated on {len(bench.held_out.indices)} others"
    return (
        f"chosen and validated on the same {chose} images, which flatters the result; --holdout 0.5 keeps "
        "half of them apart"
    )
