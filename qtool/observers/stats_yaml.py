"""The YAML files of statistics, in Distiller's schema.

Layer name -> `inputs` (0, 1, ...) and `output`, each a record of min, max, avg_min, avg_max, mean,
std, b, shape, total_numel. Files written by Distiller are read as they are.

Beside the layers there is one entry `.qtool`, with the fingerprint of what was measured, and the name and
hash of the file of histograms. It is a mapping, so that other facts about a whole file can join it; keys
that are not known are ignored.

PyYAML takes a second for the file of a large network, so one that is laid out exactly as write_stats
does it is read line by line; any other, and any with a mistake in it, goes to PyYAML.
"""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from qtool.errors import StatsError
from qtool.observers.fingerprint import HEADER, Fingerprint, fingerprint_tree, read_fingerprint
from qtool.observers.stats import RECALIBRATE, ActivationStats, LayerStats, ModelStats

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
_FIELDS = (*_NUMBERS, "shape", "total_numel")


@dataclass(frozen=True)
class Link:
    """The file of histograms that belongs to a file of statistics: its name beside it, and its SHA-256."""

    file: str
    sha256: str


def write_stats(stats: ModelStats, link: Link | None = None) -> str:
    """The text of a stats YAML."""
    header: dict[str, Any] = {}
    if stats.fingerprint is not None:
        header["fingerprint"] = fingerprint_tree(stats.fingerprint)
    if link is not None:
        header["histograms"] = {"file": link.file, "sha256": link.sha256}
    lines = [yaml.dump({HEADER: header}, Dumper=_Dumper, sort_keys=False)] if header else []
    for name, layer in stats.layers.items():
        lines.append(f"{_key(name)}:{'' if layer.inputs or layer.output else ' {}'}\n")
        if layer.inputs:
            lines.append("  inputs:\n")
            for index, record in layer.inputs.items():
                lines.append(f"    {index}:\n" + _record_text(record, "      "))
        if layer.output is not None:
            lines.append("  output:\n" + _record_text(layer.output, "    "))
    return "".join(lines)


def _key(name: str) -> str:
    """A layer's name as YAML writes it: plain, or in quotes where that would mean something else."""
    if re.fullmatch(r"[A-Za-z_][\w.]*[\w]", name, re.ASCII) and name.lower() not in _WORDS:
        return name
    if name.isascii() and name.isprintable():
        return json.dumps(name)
    return str(yaml.dump({name: 0}, Dumper=_Dumper)).removesuffix(": 0\n")


# What YAML 1.1 takes for a truth value or nothing.
_WORDS = frozenset({"yes", "no", "on", "off", "true", "false", "null"})


def _record_text(record: ActivationStats, indent: str) -> str:
    return "".join(
        f"{indent}{name}: {_scalar(getattr(record, name))}\n"
        for name in _FIELDS
        if getattr(record, name) is not None
    )


def _scalar(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value)
    text = repr(float(value)) if isinstance(value, float) else str(value)
    # YAML 1.1 wants a point in the mantissa.
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def parse_stats(text: str, source: str) -> tuple[ModelStats, Link | None]:
    """The statistics in the text of a stats YAML, and the file of histograms that it names.

    Raises:
        StatsError: if it is not YAML, or holds anything but records; all malformed records are
            reported together (the first few), each by layer and field.
    """
    tree = _quick_tree(text) or _tree(text, source)
    problems: list[str] = []
    fingerprint, link = _read_header(tree.pop(HEADER, None), problems)
    layers = {str(name): _read_layer(str(name), node, problems) for name, node in tree.items()}
    if problems:
        rest = f"\n... and {len(problems) - 5} more such problems" if len(problems) > 5 else ""
        raise StatsError("\n".join(f"{source}: {p}" for p in problems[:5]) + rest)
    return ModelStats(layers, source, fingerprint), link


def _tree(text: str, source: str) -> dict[Any, Any]:
    try:
        _check_depth(text)
        tree = yaml.load(text, Loader=_Loader)
    # A wrong tag, such as `!!int ""`, ends in a LookupError or AttributeError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise StatsError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise StatsError(f"{source}: no layers found; a mapping of layer names to records is wanted")
    return tree


_LAYER = re.compile(r'([A-Za-z_][\w.]*\w|"(?:[^"\\]|\\.)*"):', re.ASCII)
_INDEX = re.compile(r"    (\d+):")
_FIELD = re.compile(r"(    |      )(\w+): (\([\d, ]*\)|-?\d[\d.e+-]*)", re.ASCII)


def _quick_tree(text: str) -> dict[Any, Any] | None:
    """The content of a file as write_stats lays it out, or None if it is laid out in another way."""
    tree: dict[Any, Any] = {}
    layer: dict[str, Any] = {}
    inputs: dict[int, Any] | None = None
    record: dict[str, Any] | None = None
    indent = ""
    lines = text.split("\n")
    start = 0
    if lines[0] == f"{HEADER}:":
        start = next((i for i in range(1, len(lines)) if not lines[i].startswith(" ")), len(lines))
        tree |= _tree("\n".join(lines[:start]) + "\n", "header")
    try:
        for line in lines[start:]:
            if found := _FIELD.fullmatch(line):
                if record is None or found[1] != indent or found[2] in record:
                    return None
                record[found[2]] = _quick_value(found[3])
            elif line == "  inputs:" and "inputs" not in layer:
                inputs, record = layer.setdefault("inputs", {}), None
            elif line == "  output:" and "output" not in layer:
                inputs, indent = None, "    "
                record = layer.setdefault("output", {})
            elif (found := _INDEX.fullmatch(line)) and inputs is not None and int(found[1]) not in inputs:
                indent = "      "
                record = inputs.setdefault(int(found[1]), {})
            elif found := _LAYER.fullmatch(line):
                name = json.loads(found[1]) if line[0] == '"' else found[1]
                if name in tree or (line[0] != '"' and name.lower() in _WORDS):
                    return None
                layer, inputs, record = tree.setdefault(name, {}), None, None
            elif line:
                return None
    except (ValueError, StatsError):
        return None
    return tree


def _quick_value(text: str) -> Any:
    if text[0] == "(":
        return text
    return float(text) if "." in text else int(text)


def _check_depth(text: str) -> None:
    """Refuse absurd nesting, for which the fast loader would crash the interpreter."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 100:
            raise ValueError("nested more than 100 levels deep")


def _read_header(node: Any, problems: list[str]) -> tuple[Fingerprint | None, Link | None]:
    if not isinstance(node, dict | None):
        problems.append(f"{HEADER}: found {_kind(node)}; a mapping is wanted")
        return None, None
    node = node or {}
    fingerprint = None
    if node.get("fingerprint") is not None:
        try:
            fingerprint = read_fingerprint(node["fingerprint"])
        except ValueError as error:
            problems.append(f"{HEADER}.fingerprint: {error}")
    return fingerprint, _read_link(node.get("histograms"), problems)


def _read_link(node: Any, problems: list[str]) -> Link | None:
    if node is None:
        return None
    file, digest = (node.get("file"), node.get("sha256")) if isinstance(node, dict) else (None, None)
    if not (isinstance(file, str) and isinstance(digest, str)) or "/" in file:
        problems.append(f"{HEADER}.histograms: the name of a file beside this one and its sha256 are wanted")
        return None
    return Link(file, digest)


def _read_layer(name: str, node: Any, problems: list[str]) -> LayerStats:
    if not isinstance(node, dict):
        problems.append(f"{name}: found {_kind(node)}; a mapping with 'inputs' and 'output' is wanted")
        return LayerStats()
    inputs = {} if node.get("inputs") is None else node["inputs"]
    if not isinstance(inputs, dict) or not all(type(i) is int for i in inputs):
        problems.append(f"{name}.inputs: a mapping with keys 0, 1, ... is wanted")
        inputs = {}
    records = {i: _read_record(f"{name}.inputs.{i}", tree, problems) for i, tree in inputs.items()}
    output = node.get("output")
    return LayerStats(
        {i: r for i, r in records.items() if r is not None},
        None if output is None else _read_record(f"{name}.output", output, problems),
    )


def _read_record(where: str, tree: Any, problems: list[str]) -> ActivationStats | None:
    if not isinstance(tree, dict):
        problems.append(f"{where}: found {_kind(tree)}; a record with min, max, ... is wanted")
        return None
    before = len(problems)
    numbers = {name: _read_number(f"{where}.{name}", tree.get(name), problems) for name in _NUMBERS}
    for name in ("min", "max"):
        if tree.get(name) is None:
            problems.append(f"{where}: field {name!r} is missing")
    shape = _read_shape(f"{where}.shape", tree.get("shape"), problems)
    numel = tree.get("total_numel")
    if numel is not None and (not isinstance(numel, int) or numel < 0):
        problems.append(f"{where}.total_numel: found {numel!r}; a count is wanted")
    low, high = numbers.pop("min"), numbers.pop("max")
    if low is not None and high is not None and low > high:
        problems.append(f"{where}: min {low:g} is greater than max {high:g}")
    for name in ("std", "b"):
        if (numbers[name] or 0) < 0:
            problems.append(f"{where}.{name}: found {numbers[name]:g}; it cannot be negative")
    if len(problems) > before or low is None or high is None:
        return None
    fields_found: dict[str, Any] = {**numbers, "shape": shape, "total_numel": numel}
    return ActivationStats(low, high, **fields_found)


def _read_number(where: str, value: Any, problems: list[str]) -> float | None:
    if value is None:
        return None
    try:
        # YAML 1.1 takes 1e-05, as other writers spell it, for text.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        problems.append(f"{where}: found {_kind(value)}; a number is wanted")
        return None
    if not math.isfinite(number):
        problems.append(f"{where}: found {value!r}; a finite number is wanted, {RECALIBRATE}")
        return None
    return number


def _read_shape(where: str, value: Any, problems: list[str]) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        shape = tuple(ast.literal_eval(value) if isinstance(value, str) else value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shape = ("?",)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        problems.append(f"{where}: found {value!r}; a shape such as (1, 3, 224, 224) is wanted")
        return None
    return shape


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:60]
