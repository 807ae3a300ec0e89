"""A commented YAML file for a network: what is asked for, and every other option at its default."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.config.options import Option, options_of
from qtool.config.schema import SCHEMAS
from qtool.config.sections import SECTIONS, Config
from qtool.config.wording import default_of_key, help_of_key, limits_of_key

# The others are written when something is asked of them.
ALWAYS = ("model", "data", "calibration", "quantizers", "run")
WIDTH = 110
# How many names stand for the layers of a kind.
NAMED = 2


@dataclass(frozen=True)
class NamedLayer:
    """A layer of the network that the file is for.

    Args:
        name: what patterns refer to.
        op: what it computes.
        weighted: whether it has weights to quantize.
    """

    name: str
    op: str
    weighted: bool


def template(config: Config, layers: Sequence[NamedLayer], title: str) -> str:
    """The text of a file that asks for what config does.

    A line `#key: value` shows an option at its default; without its `#` it sets the same.

    Args:
        config: what is written as set, wherever it differs from the default.
        layers: of the network, in order, for examples of overrides.
        title: the first line, without its `#`.
    """
    lines = [
        *_comment(title),
        *_comment(
            "A line '#key: value' shows an option and its default; remove the '#' to set it. Relative paths "
            "are looked up beside this file, then in the working directory; ${NAME} in a path is a variable "
            "of the environment."
        ),
        f"# yaml-language-server: $schema={SCHEMAS['config'].path.as_uri()}",
    ]
    left_out = []
    for name in SECTIONS:
        section = getattr(config, name)
        if name in ALWAYS or section != type(section)():
            lines += ["", *_section(name, section, layers)]
        else:
            left_out.append(name)
    if left_out:
        lines += ["", *_comment(f"Further sections: {', '.join(left_out)}; 'qtool schema' has their keys.")]
    return "\n".join(lines) + "\n"


def _section(name: str, section: Any, layers: Sequence[NamedLayer]) -> Iterator[str]:
    yield from _comment(f"{type(section).__doc__}.")
    yield f"{name}:"
    for key, default, described in options_of(type(section)):
        if not described.layer_only:
            yield from _option(key, getattr(section, key), default, described)
    if name == "quantizers":
        yield from _overrides(section.overrides, layers)


def _option(key: str, value: Any, default: Any, described: Option) -> Iterator[str]:
    limits = limits_of_key(described)
    yield from _comment(help_of_key(described) + (f" [{limits}]" if limits else ""), "  ")
    words = default_of_key(described) if value is None else None
    mark = "#" if value == default else ""
    yield f"  {mark}{key}: {_flow(value)}" + (f"  # {words}" if words else "")


def _flow(value: Any) -> str:
    """A value on one line."""
    value = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _overrides(overrides: Mapping[str, Any], layers: Sequence[NamedLayer]) -> Iterator[str]:
    """The overrides that were asked for, or an example of some."""
    yield from _comment(
        "Settings of single layers, by name or by a regular expression for the whole name. A layer's very "
        "name wins, else the first expression that matches. 'qtool layers' lists the names.",
        "  ",
    )
    yield from _comment(f"This network has {_kinds(layers) or 'no layers'}.", "  ")
    if overrides:
        yield "  overrides:"
        yield from (f"    {_flow(pattern)}: {_flow(settings)}" for pattern, settings in overrides.items())
        return
    yield "  #overrides:"
    for pattern, settings, why in _examples(layers):
        yield f"  #  {_flow(pattern)}: {_flow(settings)}  # {why}"


def _examples(layers: Sequence[NamedLayer]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Patterns that match, what they may set, and what they are good for."""
    weighted = [layer.name for layer in layers if layer.weighted]
    if weighted:
        yield weighted[0], {"bits_weights": 8, "bits_activations": 8}, "the first layer with weights"
    if len(weighted) > 1:
        yield weighted[-1], {"bits_weights": 8, "clip_activations": "none"}, "the last one"
    groups = Counter(layer.name.split(".")[0] for layer in layers if "." in layer.name)
    if groups:
        group, count = groups.most_common(1)[0]
        yield rf"{re.escape(group)}\..*", {"bits_weights": 6}, f"the {count} layers of {group}"


def _kinds(layers: Sequence[NamedLayer]) -> str:
    """How many layers of each kind there are, and some of their names."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        names.setdefault(layer.op, []).append(layer.name)
    parts = []
    for op, found in names.items():
        shown = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
        parts.append(f"{len(found)} {op} ({shown})")
    return "; ".join(parts)


def _comment(text: str, indent: str = "") -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
