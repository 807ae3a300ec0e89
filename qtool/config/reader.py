"""The mappings of one YAML file -> checked values, and everything that is wrong with them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from qtool.config.distiller import OLD_KEYS, QUANTIZER_CLASS, WITHOUT_EFFECT, as_settings, find_quantizer
from qtool.config.options import Counts, Numbers, Option, Shape, Words, is_input_path, options_of
from qtool.config.sections import (
    DEVICE_OPTIONS,
    INPUT_SETTINGS,
    OVERRIDABLE,
    SECTIONS,
    QuantizeConfig,
    RunConfig,
)
from qtool.config.sections.corrections import Method
from qtool.config.yaml_file import Lines
from qtool.errors import ConfigError, nearest

LOG = logging.getLogger("qtool")

Place = tuple[str, ...]


class Reader:
    """Turns the mappings of one file to checked values, and gathers what is wrong with it."""

    def __init__(self, path: Path, lines: Lines, given: Collection[str] = ()) -> None:
        self.path = path
        self.lines = lines
        self.given = given
        self.problems: list[tuple[int, str]] = []

    def note(self, place: Place, text: str) -> None:
        """Remember a problem at a place of the file."""
        self.problems.append((self.lines.get(place, 1), text))

    def finish(self) -> None:
        """Report all problems together.

        Raises:
            ConfigError: if there are any.
        """
        if self.problems:
            texts = (f"{self.path}:{line}: {text}" for line, text in sorted(self.problems))
            raise ConfigError("\n".join(dict.fromkeys(texts)))

    def section(self, name: str, body: Mapping[Any, Any]) -> dict[str, Any]:
        """The values of one section."""
        if name != "quantizers":
            known = {n: d for n, _, d in options_of(SECTIONS[name])}
            values = self.settings(body, (name,), name, known)
            if name == "run":
                self._check_devices(values)
            return values
        found = find_quantizer({name: body})
        if found is not None and len(body) > 1:
            self.note((name,), f"{name}: more than one quantizer; one is wanted")
        return self.quantizer(*reversed(found)) if found else self.quantizer(body, (name,))

    def _check_devices(self, values: Mapping[str, Any]) -> None:
        defaults = {name: getattr(RunConfig, name) for name in DEVICE_OPTIONS}
        chosen = [name for name in DEVICE_OPTIONS if values.get(name, defaults[name]) != defaults[name]]
        if len(chosen) > 1:
            text = f"{' and '.join(chosen)} both say where the network runs; keep one of them"
            self.note(("run", chosen[-1]), f"run: {text}")

    def quantizer(self, body: Mapping[Any, Any], place: Place) -> dict[str, Any]:
        """The values of a quantizer, in qtool's or Distiller's spelling."""
        known = {n: d for n, _, d in options_of(QuantizeConfig) if not d.layer_only}
        plain = {k: v for k, v in body.items() if k not in ("overrides", "class")}
        values = self.settings(plain, place, place[0], known)
        if body.get("class", QUANTIZER_CLASS) != QUANTIZER_CLASS:
            self.note((*place, "class"), f"class: found {body['class']!r}; {QUANTIZER_CLASS} is wanted")
        if body.get("overrides") is not None:
            values["overrides"] = self._overrides(body["overrides"], (*place, "overrides"))
        return values

    def _overrides(self, tree: Any, place: Place) -> dict[str, dict[str, Any]]:
        if not isinstance(tree, dict):
            found = type(tree).__name__
            self.note(place, f"overrides: found {found}; a mapping of layer patterns to settings is wanted")
            return {}
        known = {n: d for n, _, d in options_of(QuantizeConfig) if n in OVERRIDABLE}
        values: dict[str, dict[str, Any]] = {}
        for pattern, settings in tree.items():
            here, where = (*place, str(pattern)), f"overrides.{pattern}"
            if not isinstance(settings, dict):
                self.note(here, f"{where}: a mapping of settings is wanted")
                continue
            plain = {k: v for k, v in settings.items() if k not in ("input_overrides", WITHOUT_EFFECT)}
            if WITHOUT_EFFECT in settings:
                LOG.info("%s: %s.%s has no effect, as in Distiller", self.path, where, WITHOUT_EFFECT)
            values[str(pattern)] = self.settings(plain, here, where, known, keep_null=True)
            if settings.get("input_overrides") is not None:
                inputs = self._inputs(settings["input_overrides"], (*here, "input_overrides"), where)
                values[str(pattern)]["input_overrides"] = inputs
        return values

    def _inputs(self, tree: Any, place: Place, where: str) -> dict[int, dict[str, Any]]:
        """Settings for single inputs of a layer: number -> from_output, or bits, mode and clipping."""
        where = f"{where}.input_overrides"
        if not isinstance(tree, dict):
            self.note(place, f"{where}: a mapping of input numbers to settings is wanted")
            return {}
        known = {n: d for n, _, d in options_of(QuantizeConfig) if n in INPUT_SETTINGS}
        values: dict[int, dict[str, Any]] = {}
        for index, settings in tree.items():
            here = (*place, str(index))
            if not str(index).isdigit() or not isinstance(settings, dict):
                self.note(here, f"{where}.{index}: an input number (0, 1, ...) with a mapping is wanted")
            elif not isinstance(settings.get("from_output", True), bool):
                found = settings["from_output"]
                self.note(here, f"{where}.{index}.from_output: found {found!r}; true or false is wanted")
            elif settings.get("from_output"):
                values[int(index)] = {"from_output": True}
            elif isinstance(settings.get("mode"), dict):
                found = settings["mode"]
                self.note(here, f"{where}.{index}.mode: found {found}; an input has one mode, such as asym_u")
            else:
                plain = {k: v for k, v in settings.items() if k != "from_output"}
                values[int(index)] = self.settings(plain, here, f"{where}.{index}", known)
        return values

    def settings(
        self,
        body: Mapping[Any, Any],
        place: Place,
        where: str,
        known: Mapping[str, Option],
        keep_null: bool = False,
    ) -> dict[str, Any]:
        """Checked values by qtool's own names; null is absent, unless it is to be kept."""
        values: dict[str, Any] = {}
        for raw_key, raw_value in body.items():
            key = str(raw_key)
            here = (*place, key)
            for name, value in as_settings(key, raw_value):
                described = known.get(name)
                if described is None:
                    self.note(here, f"{where}: {self._why_unknown(key, name, known)}")
                elif value is None:
                    if keep_null and described.nullable:
                        values.setdefault(name, None)
                else:
                    try:
                        parsed = self._value(described, value)
                        if values.get(name) not in (None, parsed):
                            raise _Problem(f"{value} contradicts another key of this setting: {values[name]}")
                        values[name] = parsed
                    except _UnsetVariable as problem:
                        if name not in self.given:
                            self.note(here, f"{where}.{key}: {problem}")
                    except _Problem as problem:
                        self.note(here, f"{where}.{key}: {problem}")
        return values

    @staticmethod
    def _why_unknown(key: str, name: str, known: Mapping[str, Option]) -> str:
        if key in OLD_KEYS:
            return f"key {key!r} is an old spelling; write {OLD_KEYS[key]!r}"
        everywhere = {n: d for n, _, d in options_of(QuantizeConfig)}
        if name == "input_overrides" or (name in everywhere and everywhere[name].layer_only):
            return f"key {key!r} is a setting of single layers; put it under 'overrides'"
        if name in everywhere:
            return f"key {key!r} cannot be set here; {', '.join(known)} can"
        return f"unknown key {key!r}{nearest(key, known)}"

    def _value(self, described: Option, value: Any) -> Any:
        parsed = _convert(described, value)
        return self._located(_with_variables(parsed)) if is_input_path(described) else parsed

    def _located(self, path: Path) -> Path:
        """A relative path is looked up beside the file, then in the working directory.

        Distiller's examples name their statistics by a path in its own source tree: where that
        leads nowhere, a file of the same name beside the YAML file is meant.
        """
        try:
            if path.is_absolute() or (path == Path(path.name) and not (self.path.parent / path).exists()):
                return path
            for candidate in (self.path.parent / path, path, self.path.parent / path.name):
                if candidate.exists():
                    if candidate.name == path.name and candidate == self.path.parent / path.name != path:
                        LOG.info("%s: taking %s for %s", self.path, candidate, path)
                    return candidate
        except (OSError, ValueError):  # a name too long; whoever opens the file says so
            pass
        return path


class _Problem(Exception):
    """One thing wrong with one value."""


class _UnsetVariable(_Problem):
    """A path with a variable that the environment lacks."""


def _with_variables(path: Path) -> Path:
    """A path in which `${NAME}` stands for a variable of the environment.

    Raises:
        _UnsetVariable: naming the one that is not set.
    """

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise _UnsetVariable(
                f"found {path}, but {match[1]} is not set; set it, as in 'export {match[1]}=/path/to', "
                "or name another path"
            )
        return found

    return Path(re.sub(r"\$\{(\w+)\}", value, str(path)))


def _convert(described: Option, value: Any) -> Any:
    """Check a YAML value as the text of a flag would be."""
    if described.multiple:
        items: Iterable[Any] = value if isinstance(value, list) else [value]
        return tuple(str(_convert_text(described, item)) for item in items)
    if isinstance(value, list) and isinstance(described.type, Counts | Numbers | Shape | Words):
        value = ",".join(str(item) for item in value)
    return _convert_text(described, value)


def _convert_text(described: Option, value: Any) -> Any:
    if isinstance(described.type, Method) and isinstance(value, dict):
        try:
            return described.type.convert(value, None, None)
        except click.BadParameter as error:
            raise _Problem(error.message) from error
    if described.is_flag != isinstance(value, bool):
        wanted = "true or false" if described.is_flag else f"a value ({described.type.name})"
        raise _Problem(f"found {value!r}; {wanted} is wanted")
    if isinstance(value, dict) and described.type.name == "choice":
        raise _Problem(f"found {value}; a name, or a mapping of both activations and weights, is wanted")
    if isinstance(value, dict | list | set | bytes):
        raise _Problem(f"found {type(value).__name__}; a single value is wanted")
    try:
        return described.type.convert(value if described.is_flag else str(value), None, None)
    except click.BadParameter as error:
        raise _Problem(error.message) from error
    except ValueError as error:  # a path with a NUL character, a number of thousands of digits
        raise _Problem(f"cannot be used: {error}") from error
