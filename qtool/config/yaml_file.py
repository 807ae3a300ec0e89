"""A YAML file as plain values, with the line of every key, read safely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qtool.errors import ConfigError

# From the keys, and numbers of list items, that lead to a setting, to the line it stands in.
Lines = dict[tuple[str, ...], int]


def parse(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping that a file holds, and its lines.

    Raises:
        ConfigError: if the file cannot be read, is not YAML, holds no mapping, or a key twice.
    """
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
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: found {type(tree).__name__}; a mapping of sections is wanted")
    return {str(k): v for k, v in (tree or {}).items()}, lines


def _note_lines(node: yaml.Node | None, prefix: tuple[str, ...], lines: Lines, path: Path) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            place = (*prefix, str(index))
            lines[place] = item.start_mark.line + 1
            _note_lines(item, place, lines, path)
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
