"""A gate for continuous integration: make runs, judge them, and say so."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path

from qtool.config.gate import Expect, Gate, GateRun, load_gate
from qtool.errors import ConfigError, QtoolError
from qtool.pipeline.gate.baseline import (
    Baseline,
    Stored,
    differences,
    read_baseline,
    write_baseline,
)
from qtool.pipeline.gate.measure import Bench, bench_key
from qtool.pipeline.gate.reports import Judged, Report, table, write_json, write_junit
from qtool.pipeline.gate.verdicts import Judge
from qtool.run_dir import check_writable


def check(
    path: Path,
    show: Callable[[str], None],
    *,
    sequential: bool = False,
    allow_undecided: bool = False,
    update_baseline: bool = False,
    json_file: Path | None = None,
    junit_file: Path | None = None,
) -> bool:
    """Make and judge the runs of a file; whether all is as expected.

    Args:
        path: the file.
        show: is given the table and, before they are stored, what is new in the stored values.
        sequential: look after every batch, and end a run when all its verdicts are certain.
        allow_undecided: let a gate pass that too few images leave open.
        update_baseline: store what is measured, in place of comparing it with what is stored.
        json_file, junit_file: where to write the report, if anywhere.

    Raises:
        ConfigError: with every problem of the file and of the files that it names.
        OutputError: if a file cannot be written.
    """
    gate = load_gate(path)
    stored = _check_baseline(gate, sequential, update_baseline)
    for output in (json_file, junit_file, gate.baseline if update_baseline else None):
        if output is not None:
            check_writable(output)
    runs = [_without_baseline(run) for run in gate.runs] if update_baseline else list(gate.runs)
    judged = _judge_all(gate, runs, {} if update_baseline else stored, sequential)
    report = Report(gate, judged, sequential, allow_undecided)
    show(table(report))
    if json_file is not None:
        write_json(json_file, report)
    if junit_file is not None:
        write_junit(junit_file, report)
    if update_baseline:
        _update(gate, stored, report, show)
    return report.passed


def _check_baseline(gate: Gate, sequential: bool, update: bool) -> Baseline:
    """What is stored; refuses a file that expects something of what is not."""
    if update and gate.baseline is None:
        raise ConfigError(f"--update-baseline: {gate.path} names no file; add 'baseline: baseline.json'")
    if update and sequential:
        raise ConfigError("--update-baseline: a baseline is of all images; leave out --sequential")
    stored = {} if gate.baseline is None else read_baseline(gate.baseline)
    missing = [
        f"{gate.path}: run {run.name!r}: not in {gate.baseline}; store its values with --update-baseline"
        for run in gate.runs
        if run.name not in stored and run != _without_baseline(run)
    ]
    if missing and not update:
        raise ConfigError("\n".join(missing))
    return stored


def _without_baseline(run: GateRun) -> GateRun:
    own = {key: threshold for key, threshold in run.expect.given().items() if not threshold.from_baseline}
    return GateRun(run.name, run.config, Expect(**own), run.judge)


def _judge_all(gate: Gate, runs: list[GateRun], stored: Baseline, sequential: bool) -> tuple[Judged, ...]:
    """All runs in the order of the file; those that share a bench are made one after the other."""
    groups: dict[Hashable, list[int]] = {}
    for index, run in enumerate(runs):
        groups.setdefault(bench_key(run.config), []).append(index)
    judged: dict[int, Judged] = {}
    for indices in groups.values():
        bench: Bench | None = None  # only one at a time is kept in memory
        for index in indices:
            start = time.perf_counter()
            run = runs[index]
            try:
                bench = bench or Bench(run.config, shuffled=sequential)
                judge = Judge(run, gate.error_rate, sequential, stored.get(run.name), bench)
                evidence = bench.measure(run.config, judge.look, run.name)
            except QtoolError as error:
                judged[index] = Judged(run, seconds=time.perf_counter() - start, error=str(error))
                continue
            judged[index] = Judged(
                run,
                bench.inputs,
                evidence,
                None if sequential else Stored.of(evidence, bench.inputs, bench.numbers),
                tuple(judge.findings(evidence)),
                tuple(judge.changes),
                time.perf_counter() - start,
            )
    return tuple(judged[index] for index in range(len(runs)))


def _update(gate: Gate, old: Baseline, report: Report, show: Callable[[str], None]) -> None:
    """Show what is new in the stored values, then store them, unless some could not be measured."""
    assert gate.baseline is not None
    new = {run.run.name: run.stored for run in report.runs if run.stored is not None}
    if len(new) < len(report.runs):
        show(f"{gate.baseline}: kept as it was, as not every run could be made")
        return
    show("\n".join([f"{gate.baseline}:", *(f"  {line}" for line in differences(old, new))]))
    write_baseline(gate.baseline, new)
