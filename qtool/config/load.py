"""YAML and flags -> Config: default < file < flag, everything checked, all problems together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import yaml

from qtool.config.options import Numbers, Option, Shape, is_path, options_of
from qtool.config.sections import OVERRIDABLE, SECTIONS, Config
from qtool.errors import ConfigError, nearest

Lines = dict[tuple[str, ...], int]

# Where null is Distiller's spelling of "stays in float".
BITS = ("bits_activations", "bits_weights")


def load_config(path: Path | None = None, /, **flags: Any) -> Config:
    """Read a YAML file and lay flags over it.

    Args:
        path: the file; None for none.
        flags: values of options by field name; None and () mean "not given".

    Raises:
        ConfigError: with every problem of the file, one line each: file, line, key, what was found.
    """
    values = {section: {} for section in SECTIONS} if path is None else _read(path)
    for section, cls in SECTIONS.items():
        for name, _, _ in options_of(cls):
            if flags.get(name) not in (None, ()):
                values[section][name] = flags[name]
    return Config(**{section: cls(**values[section]) for section, cls in SECTIONS.items()})


def _read(path: Path) -> dict[str, dict[str, Any]]:
    tree, lines = _parse(path)
    problems: list[tuple[int, str]] = []
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, body in tree.items():
        if section not in SECTIONS:
            problems.append(
                (lines.get((section,), 1), f"unknown section {section!r}{nearest(section, SECTIONS)}")
            )
        elif body is None:
            continue
        elif not isinstance(body, dict):
            problems.append(
                (lines.get((section,), 1), f"{section}: found {body!r}; a mapping of settings is wanted")
            )
        else:
            _read_section(section, body, path.parent, values[section], lines, problems)
    if problems:
        raise ConfigError("\n".join(f"{path}:{line}: {text}" for line, text in sorted(problems)))
    return values


def _parse(path: Path) -> tuple[dict[str, Any], Lines]:
    """The file as plain values, and the line of every key."""
    try:
        text = path.read_text(encoding="utf-8")
        lines: Lines = {}
        _note_lines(yaml.compose(text, Loader=yaml.SafeLoader), (), lines, path)
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file; a YAML file is wanted") from error
    # A wrong tag, such as `!!int ""`, ends in a LookupError or AttributeError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: found {type(tree).__name__}; sections {', '.join(SECTIONS)} are wanted")
    return {str(k): v for k, v in (tree or {}).items()}, lines


def _note_lines(node: yaml.Node | None, prefix: tuple[str, ...], lines: Lines, path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        place = (*prefix, str(key.value))
        line = key.start_mark.line + 1
        if place in lines:
            raise ConfigError(
                f"{path}:{line}: key {place[-1]!r} stands a second time; the first is in line {lines[place]}"
            )
        lines[place] = line
        _note_lines(value, place, lines, path)


def _read_section(
    section: str,
    body: Mapping[Any, Any],
    folder: Path,
    values: dict[str, Any],
    lines: Lines,
    problems: list[tuple[int, str]],
) -> None:
    known = {name: described for name, _, described in options_of(SECTIONS[section])}
    allowed = [f.name for f in fields(SECTIONS[section])]
    for raw_key, value in body.items():
        key = str(raw_key)
        value = 0 if value is None and key in BITS else value
        line = lines.get((section, key), 1)
        try:
            if key == "overrides" and "overrides" in allowed:
                values[key] = _read_overrides(value, lines, problems)
            elif key not in known:
                raise _Problem(f"unknown key {key!r}{nearest(key, allowed)}")
            elif value is not None:
                parsed = _convert(known[key], value)
                values[key] = _beside(parsed, folder) if is_path(known[key]) else parsed
        except _Problem as problem:
            problems.append(
                (line, f"{section}.{key}: {problem}" if key in allowed else f"{section}: {problem}")
            )


def _read_overrides(tree: Any, lines: Lines, problems: list[tuple[int, str]]) -> dict[str, dict[str, Any]]:
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise _Problem(f"found {type(tree).__name__}; a mapping of layer patterns to settings is wanted")
    known = {n: d for n, _, d in options_of(SECTIONS["quantizers"]) if n in OVERRIDABLE}
    nullable = {n for n, default, _ in options_of(SECTIONS["quantizers"]) if default is None}
    found: dict[str, dict[str, Any]] = {}
    for pattern, settings in ((str(k), v) for k, v in tree.items()):
        where = ("quantizers", "overrides", pattern)
        if not isinstance(settings, dict):
            problems.append((lines.get(where, 1), f"overrides.{pattern}: a mapping of settings is wanted"))
            continue
        found[pattern] = {}
        for key, value in ((str(k), v) for k, v in settings.items()):
            value = 0 if value is None and key in BITS else value
            try:
                if key not in known:
                    raise _Problem(f"unknown key {key!r}{nearest(key, known)}")
                if value is not None:
                    found[pattern][key] = _convert(known[key], value)
                elif key in nullable:
                    found[pattern][key] = None
            except _Problem as problem:
                at = f"overrides.{pattern}.{key}" if key in known else f"overrides.{pattern}"
                problems.append((lines.get((*where, key), 1), f"{at}: {problem}"))
    return found


class _Problem(Exception):
    """One thing wrong with one value."""


def _convert(described: Option, value: Any) -> Any:
    """Check a YAML value as the text of a flag would be."""
    if described.multiple:
        items: Iterable[Any] = value if isinstance(value, list) else [value]
        return tuple(str(_convert_text(described, item)) for item in items)
    if isinstance(value, list) and isinstance(described.type, Numbers | Shape):
        value = ",".join(str(item) for item in value)
    return _convert_text(described, value)


def _convert_text(described: Option, value: Any) -> Any:
    if described.is_flag != isinstance(value, bool):
        wanted = "true or false" if described.is_flag else f"a value ({described.type.name})"
        raise _Problem(f"found {value!r}; {wanted} is wanted")
    if isinstance(value, dict | list | set | bytes):
        raise _Problem(f"found {type(value).__name__}; a single value is wanted")
    try:
        return described.type.convert(value if described.is_flag else str(value), None, None)
    except click.BadParameter as error:
        raise _Problem(error.message) from error
    except ValueError as error:  # a path with a NUL character, a number of thousands of digits
        raise _Problem(f"cannot be used: {error}") from error


def _beside(path: Path, folder: Path) -> Path:
    """A relative path is looked up beside the YAML file, then in the working directory."""
    try:
        return folder / path if not path.is_absolute() and (folder / path).exists() else path
    except OSError:  # a name too long; whoever opens the file says so
        return path


def dump_config(config: Config) -> str:
    """The text of a YAML file that reproduces the run, every option written out, paths absolute."""
    tree: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        values = asdict(getattr(config, section))
        tree[section] = {name: _plain(value) for name, value in values.items()}
    return yaml.safe_dump(tree, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
