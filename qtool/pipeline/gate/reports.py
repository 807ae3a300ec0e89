"""What a gate found, as a table, as JSON, and as the JUnit XML that CI services show."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qtool.config.gate import Gate, GateRun
from qtool.pipeline.gate.baseline import Stored
from qtool.pipeline.gate.measure import Evidence
from qtool.pipeline.gate.verdicts import PASS, UNDECIDED, Finding
from qtool.run_dir import write_text

ERROR = "error"
# What XML 1.0 cannot hold, not even escaped.
NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


@dataclass(frozen=True)
class Judged:
    """A run, its findings, and what they rest on.

    Args:
        run: as the file has it.
        inputs: of its bench; empty if the run could not be made.
        evidence, stored: what was seen; stored only if that was every image.
        findings: one for each expectation.
        changes: how the inputs differ from the baseline's.
        seconds: spent on this run, apart from what it shares with an earlier one.
        error: why the run could not be made.
    """

    run: GateRun
    inputs: dict[str, Any] = field(default_factory=dict)
    evidence: Evidence | None = None
    stored: Stored | None = None
    findings: tuple[Finding, ...] = ()
    changes: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """All runs of a gate, judged.

    Args:
        gate: as the file has it.
        runs: in the order of the file.
        sequential: whether runs could end early.
        allow_undecided: whether an open verdict passes.
    """

    gate: Gate
    runs: tuple[Judged, ...]
    sequential: bool
    allow_undecided: bool

    def passes(self, verdict: str) -> bool:
        """Whether a verdict lets the gate pass."""
        return verdict == PASS or (verdict == UNDECIDED and self.allow_undecided)

    @property
    def passed(self) -> bool:
        """Whether everything is as expected."""
        return all(
            run.error is None and all(self.passes(f.verdict) for f in run.findings) for run in self.runs
        )


def table(report: Report) -> str:
    """A line for each expectation, and what is to say about those that did not pass."""
    width = max(3, *(len(run.run.name) for run in report.runs))
    key_width = max([11, *(len(key) for run in report.runs for key in run.run.expect.given())])
    numbers = f"{'wanted':>12}{'found':>9}{'bounds':>19}{'images':>8}"
    lines = [f"{'run':<{width}}  {'expectation':<{key_width}}{numbers}  verdict"]
    remarks = []
    for run in report.runs:
        if run.error is not None:
            lines.append(f"{run.run.name:<{width}}  {'':<{key_width}}{'':>48}  {ERROR}")
            remarks += [f"{run.run.name}: {line}" for line in run.error.splitlines()]
        for finding in run.findings:
            lines.append(f"{run.run.name:<{width}}  {_row(finding, key_width)}")
            if finding.verdict != PASS:
                remarks.append(f"{run.run.name}: {finding.key}: {finding.verdict}: {finding.reason}")
        if not any(finding.changes for finding in run.findings):
            remarks += [f"{run.run.name}: differs from the baseline: {change}" for change in run.changes]
    return "\n".join([*lines, *remarks, _last_line(report)])


def _row(finding: Finding, key_width: int) -> str:
    sign = ">=" if finding.key.endswith("_min") else "<="
    limit = str(finding.wanted) if finding.limit is None else f"{finding.limit:.3f}"
    bounds = "" if finding.bounds is None else "{:.3f} {:>8.3f}".format(*finding.bounds)
    numbers = f"{sign + ' ' + limit:>12}{finding.found:>9.3f}{bounds:>19}{finding.images:>8}"
    return f"{finding.key:<{key_width}}{numbers}  {finding.verdict}"


def _last_line(report: Report) -> str:
    findings = [finding for run in report.runs for finding in run.findings]
    good = sum(finding.verdict == PASS for finding in findings)
    images = sum(0 if run.evidence is None else run.evidence.images for run in report.runs)
    text = f"{good} of {len(findings)} expectations pass, on {images} images in {len(report.runs)} runs"
    failed = sum(run.error is not None for run in report.runs)
    return text + (f"; {failed} runs could not be made" if failed else "")


def write_json(path: Path, report: Report) -> Path:
    """Everything, for programs; an infinite number, as the SQNR of equal logits, is null."""
    tree = {
        "file": str(report.gate.path),
        "passed": report.passed,
        "error_rate": report.gate.error_rate,
        "sequential": report.sequential,
        "allow_undecided": report.allow_undecided,
        "runs": [_run_as_dict(run) for run in report.runs],
    }
    return write_text(path, json.dumps(_finite(tree), indent=2) + "\n")


def _run_as_dict(run: Judged) -> dict[str, Any]:
    measured = {} if run.evidence is None else {"images_seen": run.evidence.images, **run.evidence.values()}
    return {
        "name": run.run.name,
        "judge": run.run.judge,
        "inputs": run.inputs,
        "changes": run.changes,
        "measured": measured,
        "expectations": [_finding_as_dict(finding) for finding in run.findings],
        "seconds": round(run.seconds, 3),
        "error": run.error,
    }


def _finding_as_dict(finding: Finding) -> dict[str, Any]:
    reason = None if finding.verdict == PASS else finding.reason
    return vars(finding) | {"wanted": str(finding.wanted), "reason": reason}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_junit(path: Path, report: Report) -> Path:
    """A test suite for each run, a test case for each expectation."""
    root = ElementTree.Element("testsuites", name=_xml(str(report.gate.path)))
    for run in report.runs:
        bad = [finding for finding in run.findings if not report.passes(finding.verdict)]
        skipped = sum(finding.verdict != PASS for finding in run.findings) - len(bad)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=_xml(run.run.name),
            tests=str(len(run.run.expect.given())),
            failures=str(len(bad)),
            errors=str(0 if run.error is None else len(run.run.expect.given())),
            skipped=str(skipped),
            time=f"{run.seconds:.3f}",
        )
        for key in run.run.expect.given():
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(run.run.name), name=key)
            if run.error is not None:
                ElementTree.SubElement(case, "error", message=_xml(run.error))
        for case, finding in zip(suite, run.findings, strict=False):
            if finding.verdict != PASS:
                kind = "failure" if finding in bad else "skipped"
                message = _xml(f"{finding.verdict}: {finding.reason}")
                ElementTree.SubElement(case, kind, message=message)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _xml(text: str) -> str:
    return NOT_IN_XML.sub("?", text)
