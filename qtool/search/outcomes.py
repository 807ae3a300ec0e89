"""What was measured of a proposal, as it is kept: plain numbers and words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.search.goals import Goal
from qtool.search.space import CONFIRM, TRIAL, Finding, Proposal

OBJECTIVES = ("size", "macs", "latency")
# What each objective looks at in the values of a trial; lower is better.
COST_OF = {"size": "size_share", "macs": "bit_operations_share", "latency": "latency_ms"}
# Digits of what is summed up in float: the last ones depend on how many threads did it.
DIGITS = 6


@dataclass(frozen=True)
class Outcome:
    """What was measured.

    Args:
        values: of a trial, `top1`, `top5`, `loss` and so on; of a probe, `error`.
        seconds: that it took.
        failure: why it could not be measured, in words, or "".
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""


def rounded(value: float) -> float:
    """To the digits that do not depend on the number of threads.

    Example:
        >>> rounded(0.12345678), rounded(float("inf"))
        (0.123457, inf)
    """
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def finding_of(
    proposal: Proposal, outcome: Outcome, goal: Goal, float_value: float, objective: str
) -> Finding:
    """What a strategy is told of an outcome.

    Args:
        proposal, outcome: what was measured.
        goal: the accuracy to keep.
        float_value: of the goal's metric, of the float network on the same images.
        objective: one of OBJECTIVES.
    """
    if outcome.failure:
        return Finding(proposal)
    values = outcome.values
    if proposal.kind not in (TRIAL, CONFIRM):
        return Finding(proposal, error=float(values["error"]))
    value = float(values[goal.metric])
    if not math.isfinite(value):
        return Finding(proposal)
    cost = values.get(COST_OF[objective])
    return Finding(
        proposal,
        score=goal.score(value),
        met=goal.met(float_value, value),
        cost=float("inf") if cost is None else float(cost),
        worst=tuple(values.get("worst", ())),
    )
