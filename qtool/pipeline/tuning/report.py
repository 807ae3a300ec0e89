"""What a tuning says: lines while it runs, its history as a table, and its verdict."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtool.search.goals import Goal
from qtool.search.history import Entry
from qtool.search.outcomes import finding_of
from qtool.search.space import CONFIRM, TRIAL, Candidate, Finding

COLUMNS = (
    "number", "kind", "stage", "top1", "top5", "loss", "drop", "met", "error", "size_mb", "bit_operations",
    "engine", "seconds", "failure",
)  # fmt: skip
NAMED = 3


def candidate_words(candidate: Candidate, start: Mapping[str, Any]) -> str:
    """How a candidate differs from where the tuning started.

    Example:
        >>> start = {"mode_weights": "sym", "preset": "none"}
        >>> candidate_words(Candidate.of({"mode_weights": "sym", "preset": "fast"}, {"fc": 0, "a": 8}), start)
        'preset fast; a 8 bits; fc float'
    """
    words = [f"{name} {value}" for name, value in candidate.settings if value != start.get(name)]
    by_bits: dict[int, list[str]] = {}
    for group, bits in candidate.raised:
        by_bits.setdefault(bits, []).append(group)
    for bits, groups in sorted(by_bits.items(), reverse=True):
        more = f" and {len(groups) - NAMED} more" if len(groups) > NAMED else ""
        words.append(f"{', '.join(groups[:NAMED])}{more} {f'{bits} bits' if bits else 'float'}")
    return "; ".join(words) or "as asked for"


def rows(entries: Sequence[Entry], goal: Goal, float_value: float, objective: str) -> list[dict[str, Any]]:
    """The history as plain rows, one for each entry; what an entry has not is None."""
    found = []
    for entry in entries:
        values = entry.outcome.values
        row: dict[str, Any] = {
            "number": entry.number,
            "kind": entry.proposal.kind,
            "stage": entry.proposal.stage,
        }
        row |= {name: values.get(name) for name in ("top1", "top5", "loss", "error", "engine")}
        row["size_mb"] = values["size_bytes"] / 1e6 if "size_bytes" in values else None
        row["bit_operations"] = values.get("bit_operations_share")
        row["drop"] = row["met"] = None
        if row["top1"] is not None:
            row["drop"] = goal.drop(float_value, values[goal.metric])
            row["met"] = finding_of(entry.proposal, entry.outcome, goal, float_value, objective).met
        row["seconds"] = round(entry.outcome.seconds, 2)
        row["failure"] = entry.outcome.failure or None
        found.append({name: row[name] for name in COLUMNS})
    return found


_SHOWN: dict[str, tuple[str, int, Callable[[Any], str]]] = {
    "number": ("no.", 4, str),
    "top1": ("top-1", 8, "{:.3f}".format),
    "loss": ("loss", 9, "{:.4f}".format),
    "drop": ("drop", 8, "{:.3f}".format),
    "met": ("met", 5, lambda met: "yes" if met else "no"),
    "error": ("error", 9, "{:.2e}".format),
    "size_mb": ("MB", 8, "{:.2f}".format),
    "bit_operations": ("bit ops", 9, lambda share: f"{100 * share:.1f} %"),
    "seconds": ("s", 7, "{:.1f}".format),
}


def history_table(table: Sequence[Mapping[str, Any]], words: Sequence[str], probes: bool = False) -> str:
    """The history for the terminal.

    Args:
        table: from rows.
        words: what each row's candidate is.
        probes: whether probes are shown too.
    """
    shown = {key: column for key, column in _SHOWN.items() if probes or key != "error"}
    lines = ["".join(f"{head:>{width}}" for head, width, _ in shown.values()) + "  what"]
    for row, what in zip(table, words, strict=True):
        if row["kind"] not in (TRIAL, CONFIRM) and not probes:
            continue
        cells = "".join(
            f"{'' if row[key] is None else text(row[key]):>{width}}"
            for key, (_, width, text) in shown.items()
        )
        note = f" ({row['kind']})" if row["kind"] != TRIAL else ""
        failure = f": {row['failure']}" if row["failure"] else ""
        lines.append(f"{cells}  {what}{note}{failure}")
    return "\n".join(lines)


def history_csv(table: Sequence[Mapping[str, Any]], words: Sequence[str]) -> str:
    """The history with all digits, for programs."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*COLUMNS, "what"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "what": what} for row, what in zip(table, words, strict=True))
    return file.getvalue().removesuffix("\n")


def line_of(entry: Entry, finding: Finding, goal: Goal, float_value: float, what: str) -> str:
    """What is said of a trial when it is there."""
    values = entry.outcome.values
    if entry.outcome.failure:
        return f"trial {entry.number}: {what}: cannot be made: {entry.outcome.failure}"
    value = values[goal.metric]
    met = ", meets the goal" if finding.met else ""
    again = "" if entry.proposal.kind == TRIAL else f", again by {values['engine']}"
    return (
        f"trial {entry.number}{again}: {what}: {goal.metric} {value:.4g}, "
        f"drop {goal.drop(float_value, value):.3g}{met}, {entry.outcome.seconds:.1f} s"
    )
