"""The file of `qtool check`: runs, each a configuration, and what is expected of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.config.layers import check
from qtool.config.load import Reader, read_sections
from qtool.config.options import PositiveFloat, option, options_of
from qtool.config.sections import SECTIONS, Config
from qtool.config.yaml_file import parse
from qtool.errors import ConfigError, nearest

JUDGES = ("interval", "point")
RUN_KEYS = ("name", "config", "judge", "expect", *SECTIONS)


@dataclass(frozen=True)
class Threshold:
    """A limit: a number, or one relative to what the baseline has.

    Args:
        value: the limit itself, or what is added to the baseline's value.
        from_baseline: which of the two.
    """

    value: float
    from_baseline: bool = False

    def __str__(self) -> str:
        if not self.from_baseline:
            return f"{self.value:g}"
        return "baseline" + (f" {'+-'[self.value < 0]} {abs(self.value):g}" if self.value else "")


class ThresholdType(click.ParamType[Threshold]):
    """A number, `baseline`, or `baseline` plus or minus a number."""

    name = "98.5 or baseline - 0.5"

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Threshold:
        relative = re.fullmatch(r"baseline(?:\s*([+-])\s*(.+))?", str(value).strip())
        try:
            number = float((relative[2] or 0) if relative else value)
        except ValueError:
            self.fail(f"{value!r} is not a number, 'baseline', or such as 'baseline - 0.5'.", param, ctx)
        if relative and 0 <= number < math.inf:
            return Threshold(-number if relative[1] == "-" else number, from_baseline=True)
        if relative or not self.minimum <= number <= self.maximum or not math.isfinite(number):
            wanted = "a finite number" if math.inf in (self.maximum, number) else "in the range "
            wanted += "" if wanted.startswith("a") else f"{self.minimum:g}<=x<={self.maximum:g}"
            self.fail(f"{value} is not {wanted}.", param, ctx)
        return Threshold(number)


@dataclass(frozen=True)
class Expect:
    """What a run should reach; percent, percentage points and dB."""

    top1_min: Threshold | None = option(None, ThresholdType(0, 100), "Top-1 of the quantized network.")
    drop_max: Threshold | None = option(
        None, ThresholdType(-100, 100), "Top-1 of the float network, minus the quantized one's."
    )
    agreement_min: Threshold | None = option(
        None, ThresholdType(0, 100), "Share of images with the same prediction."
    )
    logit_sqnr_db_min: Threshold | None = option(
        None, ThresholdType(-math.inf, math.inf), "SQNR of the quantized logits against the float ones."
    )

    def given(self) -> dict[str, Threshold]:
        """The expectations that were stated."""
        return {name: threshold for name, threshold in vars(self).items() if threshold is not None}


@dataclass(frozen=True)
class _Settings:
    """What holds for all runs of a file."""

    baseline: str | None = option(None, click.STRING, "File of the stored values, beside this one.")
    error_rate: float = option(0.05, PositiveFloat(0.5), "Of a wrong pass, and of a wrong fail.")
    judge: str = option("interval", click.Choice(JUDGES), "Whether sampling error counts.")


@dataclass(frozen=True)
class _RunSettings:
    """What is stated once for a run, apart from its sections and expectations."""

    name: str | None = option(None, click.STRING, "What to call it.")
    config: str | None = option(None, click.STRING, "File with its sections, beside this one.")
    judge: str | None = option(None, click.Choice(JUDGES), "As for all runs, for this one.")


@dataclass(frozen=True)
class GateRun:
    """One run of a gate: a name of its own, a checked configuration, and what is expected."""

    name: str
    config: Config
    expect: Expect
    judge: str


@dataclass(frozen=True)
class Gate:
    """A checked file of `qtool check`."""

    path: Path
    runs: tuple[GateRun, ...]
    baseline: Path | None
    error_rate: float


def load_gate(path: Path) -> Gate:
    """Read and check a gate's file, and the configurations that it names.

    Raises:
        ConfigError: with every problem of all these files, one line each.
    """
    tree, lines = parse(path)
    reader = Reader(path, lines)
    plain = {key: value for key, value in tree.items() if key != "runs"}
    known = {name: described for name, _, described in options_of(_Settings)}
    settings = _Settings(**reader.settings(plain, (), "settings of all runs", known))
    bodies = tree.get("runs")
    if not isinstance(bodies, list) or not bodies:
        found = "nothing" if not bodies else type(bodies).__name__
        reader.note(("runs",), f"runs: found {found}; a list of runs is wanted, each with a name")
        bodies = []
    elsewhere: list[str] = []
    runs = [_read_run(reader, index, body, settings, elsewhere) for index, body in enumerate(bodies)]
    names = [run.name for run in runs if run is not None]
    for index, run in enumerate(runs):
        if run is not None and run.name in names[: names.index(run.name)] + _earlier(runs, index):
            reader.note(("runs", str(index), "name"), f"runs.{run.name}: stands a second time; rename it")
    _finish(reader, elsewhere)
    baseline = None if settings.baseline is None else path.parent / settings.baseline
    return Gate(path, tuple(run for run in runs if run is not None), baseline, settings.error_rate)
