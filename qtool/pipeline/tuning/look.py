"""Looking at the history of a tuning: its table, and the settings of one trial."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import ConfigError
from qtool.pipeline.tuning.report import candidate_words, history_csv, history_table, rows
from qtool.run_dir import check_writable, write_text
from qtool.search.goals import Goal
from qtool.search.history import Entry, read_history
from qtool.search.space import PROBE, RANKING


def show(path: Path, form: str = "table", probes: bool = False) -> str:
    """The trials of a history.

    Args:
        path: the file.
        form: "table", or "csv" with all digits and probes.
        probes: whether the table has probes too.

    Raises:
        ConfigError: if it is no history, or has no trials yet.
    """
    with read_history(path) as history:
        entries, fact = history.entries(), history.fact("goal")
    if not entries or fact is None:
        raise ConfigError(f"{path}: no trial has ended yet; look again later")
    goal = Goal(fact["metric"], fact["max_drop"], fact["relative"])
    table = rows(entries, goal, fact["float"], fact["objective"])
    words = [candidate_words(e.proposal.candidate, fact["start"]) for e in entries]
    if form == "csv":
        return history_csv(table, words)
    head = f"{path}: {goal.words()}, float {goal.metric} {fact['float']:.4f}"
    left = sum(e.proposal.kind in (PROBE, RANKING) for e in entries)
    more = [f"{left} probes on a few images are left out; --probes shows them"] if left and not probes else []
    return "\n".join([head, history_table(table, words, probes), *more])


def settings(path: Path, number: int, output: Path | None = None) -> str:
    """The settings of one trial, as `qtool quantize -c` takes them: their text, or the file they are in.

    Raises:
        ConfigError: if there is no such trial.
        OutputError: if the file cannot be written.
    """
    entry = _entry(path, number)
    if output is None:
        return entry.settings.removesuffix("\n")
    check_writable(output)
    return str(write_text(output, entry.settings))


def _entry(path: Path, number: int) -> Entry:
    with read_history(path) as history:
        entries = history.entries()
    for entry in entries:
        if entry.number == number:
            return entry
    raise ConfigError(f"{path}: has trials 1 to {len(entries)}, and none of number {number}")
