"""Accuracy-aware tuning: the section `tuning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.config.options import OUTPUT, NonNegativeFloat, Words, WorkersOf, option
from qtool.config.sections.evaluation import AUTO, ENGINES
from qtool.numerics.spec import MAX_BITS, MIN_BITS

GOAL_METRICS = ("top1", "top5", "loss")
OBJECTIVES = ("size", "macs", "latency")
STRATEGIES = ("basic", "greedy-revert", "bayesian", "exhaustive", "random")
# What of the settings may be tuned, in the order in which the strategies try it.
TUNED = ("modes", "estimators", "granularity", "ends", "corrections", "groups")
FLOAT = "float"
AT_GOAL, AT_LIMIT = "goal", "limit"


@dataclass(frozen=True)
class TuningConfig:
    """Tuning to an accuracy goal"""

    max_drop: float = option(
        0.5,
        NonNegativeFloat(),
        "How much of the metric may be lost against the float network: points of top-1 or top-5, units of "
        "loss; with --relative, percent of the float network's.",
        "--max-drop",
    )
    relative_drop: bool = option(
        False, click.BOOL, "Take --max-drop as percent of the float network's metric.", "--relative"
    )
    goal_metric: str = option("top1", click.Choice(GOAL_METRICS), "What is to be kept.", "--metric")
    objective: str = option(
        "size",
        click.Choice(OBJECTIVES),
        "What to choose by among networks that meet the goal: bytes of weights, bit operations, or the time "
        "that was measured for an image.",
        "--objective",
    )
    strategy: str = option(
        "basic",
        click.Choice(STRATEGIES),
        "In which order networks are tried (docs/tuning.md); bayesian needs the extra qtool[bayesian].",
        "--strategy",
    )
    stop_at: str = option(
        AT_GOAL,
        click.Choice((AT_GOAL, AT_LIMIT)),
        "End with the first network that meets the goal, or go on to the limits and take the best by "
        "--objective.",
        "--stop-at",
    )
    time_limit: float = option(
        0.0,
        NonNegativeFloat(),
        "Begin no trial after so many seconds; 0 for no limit.",
        "--timeout",
        metavar="SECONDS",
    )
    max_trials: int = option(
        100,
        click.IntRange(1),
        "Make at most so many trials; probes on a few images do not count.",
        "--max-trials",
    )
    tuned: tuple[str, ...] = option(
        TUNED,
        Words(TUNED),
        "What of the settings may be changed: names separated by commas; all else stays as it was asked for.",
        "--tuned",
        shown_default=",".join(TUNED),
    )
    fallback_bits: tuple[str, ...] | None = option(
        None,
        Words((*(str(bits) for bits in range(MIN_BITS, MAX_BITS + 1)), FLOAT)),
        "What single groups of layers may have in place of the bits asked for, in the order in which it is "
        "tried: numbers of bits, or float.",
        "--fallback",
        metavar="N,float",
        shown_default="float, and 8 before that where fewer are asked for",
    )
    ranking_images: int = option(
        64,
        click.IntRange(1),
        "Images on which settings and groups are ranked by the error of the logits: those that the start "
        "does worst.",
        "--ranking-images",
    )
    holdout: float = option(
        0.0,
        NonNegativeFloat(0.9),
        "Share of the evaluation images that validate the result and choose nothing; 0 validates on those "
        "that chose.",
        "--holdout",
    )
    trial_engine: str = option(
        AUTO,
        click.Choice(ENGINES),
        "What computes the trials, as --engine says it of the result; what meets the goal is measured by "
        "--engine too.",
        "--trial-engine",
    )
    history: Path | None = option(
        None,
        OUTPUT,
        "File of all trials; a tuning whose file is there goes on where it was.",
        "--history",
        shown_default="tuning.db in the run's folder",
    )
    trial_workers: str = option(
        "1",
        WorkersOf(),
        "Who makes independent trials: so many processes, or a Ray cluster (the extra qtool[ray]).",
        "--workers",
        metavar="N|ray",
    )
