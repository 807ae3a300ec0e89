"""What a tuning leaves: the network that it chose, validated, and what is to be said of it."""

from __future__ import annotations

import logging
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
from qtool.pipeline.tuning.bench import Bench, rows_of
from qtool.pipeline.tuning.opening import Opened
from qtool.pipeline.tuning.report import candidate_words, history_table, rows
from qtool.pipeline.tuning.space import config_of
from qtool.report import Result, compare, table
from qtool.run_dir import write_text
from qtool.search.goals import UNITS, Goal
from qtool.search.history import Entry, History
from qtool.search.space import TRIAL
from qtool.search.tuner import Tuned

LOG = logging.getLogger("qtool")

TUNED_FILE = "tuned.yaml"
# Trials that the table at the end shows; `qtool tune history` shows all.
SHOWN_TRIALS = 30


def conclude(
    config: Config, opened: Opened, bench: Bench, history: History, tuned: Tuned, folder: Path
) -> tuple[runs.Outcome, bool]:
    """Write the network that was chosen, validate it, and say how it ended.

    Raises:
        ConfigError: if no trial could be made.
    """
    best = tuned.best
    if best is None:
        failures = [e.outcome.failure for e in history.entries() if e.outcome.failure]
        reason = f", the first because {failures[0]}" if failures else f": {tuned.why}"
        raise ConfigError(f"tuning: not one of {tuned.trials} trials could be made{reason}")
    asked = config.tuning
    goal = Goal(asked.goal_metric, asked.max_drop, asked.relative_drop)
    made = bench.make(best.proposal.candidate)
    runs.log_notes(made.model)
    images = bench.held_out if asked.holdout else bench.choosing
    engine = open_engine(config, made.model, images)
    winner = config_of(config, best.proposal.candidate, bench.parts.space)
    save_stats(made.stats, folder / STATS_FILE)
    runs.write_model(config, folder, opened.subject, opened.traced, made.model, made.specs)
    write_engine(folder, engine)
    result = evaluate_images(config, engine.network, images, "validating")
    float_result = rows_of(bench.parts.float_result, images.indices)
    verdict = _verdict(goal, float_result, result, tuned, bench)
    head = (
        f"# {verdict['words']}\n# met: {str(verdict['met']).lower()}\n# Use: qtool quantize -c {TUNED_FILE}\n"
    )
    write_text(folder / TUNED_FILE, head + dump_config(winner))
    results = {"float": float_result, "quantized": result}
    comparison = compare(float_result, result)
    record = runs.record_of(config, opened.subject, images, results, comparison)
    record["engine"] = engine_record(config, engine)
    record["calibration"] = opened.ranges.record
    record |= made.record
    record["tuning"] = _record(config, tuned, best, verdict, history)
    verified, parity = verify(config, folder, made.model, engine.native, images)
    runs.finish(config, folder, record | parity, images, results)
    lines = [
        _table(goal, float(bench.float_result.as_dict()[goal.metric]), history, bench, asked.objective),
        f"{opened.subject.arch}, {images.words}",
        table(results, comparison),
        engine_text(engine),
        verified,
        verdict["words"],
        _images_words(bench),
        str(folder / TUNED_FILE),
    ]
    return runs.Outcome("\n".join(filter(None, lines)), folder, record), verdict["met"]


def image_values(metric: str, result: Result) -> Tensor:
    """The metric of each image by itself, (N,): 0 or 100, or its loss."""
    if metric == "loss":
        return F.cross_entropy(result.logits.double(), result.labels, reduction="none")
    return 100 * top_k_correct(result.logits, result.labels, int(metric.removeprefix("top"))).double()


def _verdict(goal: Goal, float_result: Result, result: Result, tuned: Tuned, bench: Bench) -> dict[str, Any]:
    """Whether the goal is met on the images that validate, with what confidence, and what limited it."""
    float_value, value = (float(r.as_dict()[goal.metric]) for r in (float_result, result))
    drop = goal.drop(float_value, value)
    met = tuned.met and goal.met(float_value, value)
    confidence = goal.confidence(image_values(goal.metric, float_result), image_values(goal.metric, result))
    unit = "%" if goal.relative and float_value else UNITS[goal.metric]
    limit = f"{goal.max_drop:g} {unit} allowed"
    assert tuned.best is not None
    found = f"drop {drop:.3f}, {limit}"
    sure = f"{100 * confidence:.1f} % sure that it is met on images like these {result.images}"
    if met:
        words = f"goal met: {found}; {sure} (trial {tuned.best.number}; {tuned.why})"
    elif tuned.met:
        words = f"goal met on the images that chose, but not on those that validate: {found}; {sure}"
    else:
        words = f"goal not met: {found} (the best is trial {tuned.best.number}; {tuned.why})"
    return {"met": met, "drop": drop, "confidence": confidence, "words": words}


def _record(
    config: Config, tuned: Tuned, best: Entry, verdict: dict[str, Any], history: History
) -> dict[str, Any]:
    asked = config.tuning
    return {
        "metric": asked.goal_metric,
        "max_drop": asked.max_drop,
        "relative": asked.relative_drop,
        "met": verdict["met"],
        "drop": verdict["drop"],
        "confidence": verdict["confidence"],
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


COSTS = ("size_bytes", "size_share", "bit_operations_share", "float_macs_share", "latency_ms")


def _table(goal: Goal, float_value: float, history: History, bench: Bench, objective: str) -> str:
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
