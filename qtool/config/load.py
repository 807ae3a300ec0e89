"""YAML and flags -> Config: default < file < flag, everything checked, all problems together."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from qtool.config.distiller import QUANTIZER_CLASS, find_quantizer
from qtool.config.options import Option, options_of
from qtool.config.reader import Reader
from qtool.config.sections import DEVICE_OPTIONS, LISTS, SECTIONS, Config, QuantizeConfig, RunConfig
from qtool.config.yaml_file import parse
from qtool.errors import ConfigError, nearest

LOG = logging.getLogger("qtool")


def load_config(path: Path | None = None, /, *, quantizer_file: Path | None = None, **flags: Any) -> Config:
    """Read a YAML file and lay flags over it.

    Args:
        path: the file; None for none.
        quantizer_file: a file whose quantizer takes the place of path's, in Distiller's form.
        flags: values of options by field name; None and () mean "not given".

    Raises:
        ConfigError: with every problem of the file, one line each: file, line, key, what was found.
        TypeError: if there is no such option as a flag names.
    """
    known = {name for cls in SECTIONS.values() for name, _, _ in options_of(cls)}
    unknown = [name for name in flags if name not in known]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}{nearest(unknown[0], known)}")
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    if path is not None:
        values |= read_sections(path, given)
    if quantizer_file is not None:
        values["quantizers"] = _read_quantizer(quantizer_file, given)
    for section, cls in SECTIONS.items():
        for name, _, described in options_of(cls):
            if name in given:
                _lay_over(values[section], name, given[name], _as_flag(name, described, given[name]))
    return Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})


def _lay_over(values: dict[str, Any], name: str, value: Any, flag: str) -> None:
    """Put a flag's value in place of the file's, and say so where they differ."""
    in_file = values.get(name, value)
    if in_file != value:
        LOG.info("%s wins over the file, which has %s", flag, _in_words(in_file))
    values[name] = value
    if name not in DEVICE_OPTIONS or value is False:
        return
    for other in DEVICE_OPTIONS:  # they answer the same question
        if other != name and other in values:
            dropped = values.pop(other)
            if dropped != getattr(RunConfig, other):
                LOG.info("%s wins over the file, which has %s: %s", flag, other, dropped)


def _as_flag(name: str, described: Option, value: Any) -> str:
    """A setting as it stands on the command line; the argument DATA has no flag.

    Example:
        >>> import click
        >>> _as_flag("mode", Option(click.STRING, "", ("--qe-mode", "--qem")), "sym")
        '--qe-mode sym'
    """
    flag = next((f for f in described.flags if f.startswith("--")), "DATA" if name == "path" else name)
    if described.is_flag:
        return flag
    return f"{flag} {_in_words(value)}"


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_sections(path: Path, given: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """The values that a file gives, by section and option.

    Args:
        path: the file.
        given: options that flags win, so that a variable in their paths need not be set.

    Raises:
        ConfigError: with every problem of the file.
    """
    tree, lines = parse(path)
    reader = Reader(path, lines, given)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, body in tree.items():
        if section not in SECTIONS:
            reader.note((section,), f"unknown section {section!r}{nearest(section, SECTIONS)}")
        elif isinstance(body, dict):
            values[section] = reader.section(section, body)
        elif isinstance(body, list) and section in LISTS:
            values[section] = reader.section(section, {LISTS[section]: body})
        elif body is not None:
            reader.note((section,), f"{section}: found {body!r}; a mapping of settings is wanted")
    reader.finish()
    return values


def _read_quantizer(path: Path, given: Collection[str]) -> dict[str, Any]:
    """The quantizer of a file: Distiller's component, or the section `quantizers` of qtool's own form."""
    tree, lines = parse(path)
    reader = Reader(path, lines, given)
    found = find_quantizer(tree)
    if found is None and isinstance(tree.get("quantizers"), dict):
        found = ("quantizers",), tree["quantizers"]
    if found is None:
        raise ConfigError(
            f"{path}: no quantizer found; a component with class: {QUANTIZER_CLASS}, or a section "
            "'quantizers', is wanted"
        )
    values = reader.quantizer(found[1], found[0])
    reader.finish()
    return values


def dump_config(config: Config) -> str:
    """The text of a YAML file that reproduces the run, every option written out, paths absolute."""
    tree = {section: _tree(section, getattr(config, section)) for section in SECTIONS}
    tree["model"]["arch"] = absolute_arch(config.model.arch)
    return yaml.safe_dump(tree, sort_keys=False)


def absolute_arch(arch: str | None) -> str | None:
    """The name of a network; that of the user's own file is found from anywhere."""
    file, colon, factory = (arch or "").rpartition(".py:")
    return f"{Path(f'{file}.py').absolute()}:{factory}" if colon else arch


def dump_quantizers(config: QuantizeConfig) -> str:
    """The text of a YAML file with the section `quantizers` only."""
    return yaml.safe_dump({"quantizers": _tree("quantizers", config)}, sort_keys=False)


def _tree(name: str, section: Any) -> dict[str, Any]:
    layer_only = {n for n, _, d in options_of(SECTIONS[name]) if d.layer_only} | {"input_overrides"}
    return {key: _plain(value) for key, value in asdict(section).items() if key not in layer_only}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
