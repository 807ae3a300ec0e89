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
from qtool.config.load import read_sections
from qtool.config.options import PositiveFloat, option, options_of
from qtool.config.reader import Reader
from qtool.config.searches import check_search, refuse_given
from qtool.config.sections import DEVICE_OPTIONS, SECTIONS, Config
from qtool.config.yaml_file import parse
from qtool.errors import ConfigError, nearest

JUDGES = ("interval", "point")


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
        relative = re.fullmatch(r"baseline(?:\s*([+-])\s*(\S+))?", str(value).strip())
        try:
            number = float((relative[2] or 0) if relative else value)
        except ValueError:
            self.fail(f"{value!r} is not a number, or such as 'baseline - 0.5'.", param, ctx)
        minimum, maximum = (0, math.inf) if relative else (self.minimum, self.maximum)
        if not (minimum <= number <= maximum and math.isfinite(number)):
            self.fail(f"{value} is not in the range {minimum:g}<=x<={maximum:g}.", param, ctx)
        if relative:
            return Threshold(-number if relative[1] == "-" else number, from_baseline=True)
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
class Settings:
    """What holds for all runs of a file."""

    baseline: str | None = option(None, click.STRING, "File of the stored values, beside this one.")
    error_rate: float = option(0.05, PositiveFloat(0.5), "Of a wrong pass, and of a wrong fail.")
    judge: str = option("interval", click.Choice(JUDGES), "Whether sampling error counts.")


@dataclass(frozen=True)
class RunSettings:
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
    settings = Settings(**_stated(reader, tree, Settings, "check", also=("runs",)))
    bodies = tree.get("runs")
    if not isinstance(bodies, list) or not bodies:
        found = type(bodies).__name__ if bodies else "nothing"
        reader.note(("runs",), f"runs: found {found}; a list of runs is wanted")
        bodies = []
    elsewhere: list[str] = []
    runs: list[GateRun] = []
    for index, body in enumerate(bodies):
        inside = {place[2:]: n for place, n in lines.items() if place[:2] == ("runs", str(index))}
        own = Reader(path, inside)
        run = _read_run(own, body, f"runs.{index}", settings, elsewhere)
        if run is not None and run.name in (earlier.name for earlier in runs):
            own.note(("name",), f"runs.{index}.name: {run.name!r} is another run's name; choose a new one")
        runs += [] if run is None else [run]
        reader.problems += own.problems
    try:
        reader.finish()
    except ConfigError as error:
        elsewhere.insert(0, str(error))
    if elsewhere:
        raise ConfigError("\n".join(dict.fromkeys(elsewhere)))
    baseline = None if settings.baseline is None else path.parent / settings.baseline
    return Gate(path, tuple(runs), baseline, settings.error_rate)


def _read_run(
    reader: Reader, body: Any, where: str, settings: Settings, elsewhere: list[str]
) -> GateRun | None:
    """One run, or None if it cannot be told what it is; problems go to the reader and elsewhere."""
    if not isinstance(body, dict):
        reader.note((), f"{where}: found {type(body).__name__}; a mapping with a name is wanted")
        return None
    stated = _stated(reader, body, RunSettings, where, also=("expect", *SECTIONS))
    if "name" not in stated:
        reader.note((), f"{where}: has no name; one is wanted, to speak of it")
    name = stated.get("name", "")
    judge = stated.get("judge", settings.judge)
    config = _read_config(reader, body, stated.get("config"), elsewhere)
    try:
        check(config.quantizers)
        check_search(config, searches=False)
        refuse_given(config, ("search",), "a gate does not search")
        refuse_given(config, ("conversion",), "a gate judges the simulation and converts nothing")
        refuse_given(config, ("evaluation",), "a gate judges the simulation")
    except ConfigError as error:
        reader.note((), f"{where}: {error}")
    if config.lapq.enabled:
        reader.note(
            ("lapq",),
            f"{where}.lapq: a gate does not search; name a search's quant_params_dict.yaml as its config",
        )
    return GateRun(name, config, _read_expect(reader, body.get("expect"), where, settings), judge)


def _read_config(reader: Reader, body: Mapping[str, Any], file: str | None, elsewhere: list[str]) -> Config:
    """The sections of the file that a run names, under those that stand in the run itself."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    if file is not None:
        try:
            values |= read_sections(reader.path.parent / file)
        except ConfigError as error:
            elsewhere += str(error).splitlines()
    for section in SECTIONS:
        if isinstance(body.get(section), dict):
            own = reader.section(section, body[section])
            if not own.keys().isdisjoint(DEVICE_OPTIONS):  # the run's answer to where it computes
                values[section] = {k: v for k, v in values[section].items() if k not in DEVICE_OPTIONS}
            values[section] = values[section] | own
        elif body.get(section) is not None:
            reader.note((section,), f"{section}: found {body[section]!r}; a mapping of settings is wanted")
    return Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})


def _read_expect(reader: Reader, body: Any, where: str, settings: Settings) -> Expect:
    known = [name for name, _, _ in options_of(Expect)]
    if not isinstance(body, dict) or not body:
        reader.note(("expect",), f"{where}.expect: nothing is expected; state some of {', '.join(known)}")
        return Expect()
    values = _stated(reader, body, Expect, f"{where}.expect", place=("expect",))
    for key, threshold in values.items():
        if threshold.from_baseline and settings.baseline is None:
            reader.note(
                ("expect", key),
                f"{where}.expect.{key}: found {threshold}, but no baseline; name its file at the top, "
                "as in 'baseline: baseline.json'",
            )
    return Expect(**values)


def _stated(
    reader: Reader,
    body: Mapping[str, Any],
    cls: type,
    where: str,
    place: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The checked values of a class's options; other keys, but for those in also, are problems."""
    known = {name: described for name, _, described in options_of(cls)}
    for key in map(str, body):
        if key not in known and key not in also:
            text = f"{where}: unknown key {key!r}{nearest(key, [*known, *also])}"
            reader.note((*place, key), text)
    return reader.settings({k: v for k, v in body.items() if k in known}, place, where, known)
