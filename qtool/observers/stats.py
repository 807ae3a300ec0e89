"""What calibration measured, and the YAML files that hold it.

The file has Distiller's schema: layer name -> `inputs` (0, 1, ...) and `output`, each a record of
min, max, avg_min, avg_max, mean, std, b, shape, total_numel. Files written by Distiller are read as
they are; a field that an old one lacks is None and is asked for only when something needs it.

Beside the layers there is one entry `.qtool`, with the fingerprint of what was measured. It is a
mapping, so that other facts about a whole file can join it; keys that are not known are ignored.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray

from qtool.errors import StatsError, nearest
from qtool.numerics.histogram import Histogram
from qtool.observers.fingerprint import HEADER, Fingerprint, fingerprint_tree, read_fingerprint

Floats: TypeAlias = "NDArray[np.float32]"

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


@dataclass(frozen=True)
class ActivationStats:
    """One tensor over all calibration images, in units of the tensor.

    Args:
        min, max: over all elements.
        avg_min, avg_max: means over the images of each image's smallest and largest element.
        mean: over all elements.
        std: population standard deviation (divided by N).
        b: mean absolute deviation from the mean.
        shape: of one image's part, (1, ...); in Distiller's files of the first batch.
        total_numel: number of elements seen.
        histogram: counts of a sample of the elements.
        image_min, image_max: (images,), float32: each image's smallest and largest element.
        channel_min, channel_max: (C,), float32: each channel's.
    """

    min: float
    max: float
    avg_min: float | None = None
    avg_max: float | None = None
    mean: float | None = None
    std: float | None = None
    b: float | None = None
    shape: tuple[int, ...] | None = None
    total_numel: int | None = None
    histogram: Histogram | None = field(default=None, compare=False, repr=False)
    image_min: Floats | None = field(default=None, compare=False, repr=False)
    image_max: Floats | None = field(default=None, compare=False, repr=False)
    channel_min: Floats | None = field(default=None, compare=False, repr=False)
    channel_max: Floats | None = field(default=None, compare=False, repr=False)

    def clamped(self, low: float, high: float) -> ActivationStats:
        """The record with min, max and their averages moved into [low, high]; the rest stays."""

        def inside(value: float | None) -> float | None:
            return None if value is None else min(max(value, low), high)

        def all_inside(values: Floats | None) -> Floats | None:
            return None if values is None else np.clip(values, low, high)

        return replace(
            self,
            min=min(max(self.min, low), high),
            max=min(max(self.max, low), high),
            avg_min=inside(self.avg_min),
            avg_max=inside(self.avg_max),
            histogram=None if self.histogram is None else self.histogram.clamped(low, high),
            image_min=all_inside(self.image_min),
            image_max=all_inside(self.image_max),
            channel_min=all_inside(self.channel_min),
            channel_max=all_inside(self.channel_max),
        )


@dataclass(frozen=True)
class LayerStats:
    """The tensors that a layer reads, by position, and the one that it gives."""

    inputs: Mapping[int, ActivationStats] = field(default_factory=dict)
    output: ActivationStats | None = None


@dataclass(frozen=True)
class ModelStats:
    """Statistics of a whole network.

    Args:
        layers: by layer name, in the order of execution.
        source: where they came from, for messages: a file name, or "this calibration".
        fingerprint: of what they were measured on, None where that is not known.
    """

    layers: Mapping[str, LayerStats]
    source: str = "this calibration"
    fingerprint: Fingerprint | None = None

    def output(self, name: str) -> ActivationStats:
        """The record of a layer's output.

        Raises:
            StatsError: if there is none, with the nearest names.
        """
        record = self._layer(name).output
        if record is None:
            raise StatsError(
                f"{self.source}: layer {name!r} has no record of its output; {_RECALIBRATE} "
                "(the output of a layer with a folded batch norm is that of the batch norm)"
            )
        return record

    def input(self, name: str, index: int) -> ActivationStats:
        """The record of a layer's input number index.

        Raises:
            StatsError: if there is none.
        """
        inputs = self._layer(name).inputs
        if index not in inputs:
            raise StatsError(
                f"{self.source}: layer {name!r} has no record of its input {index}; {_RECALIBRATE}"
            )
        return inputs[index]

    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one batch of network inputs: that of the first layer's input 0."""
        for layer in self.layers.values():
            return layer.inputs[0].shape if 0 in layer.inputs else None
        return None

    def _layer(self, name: str) -> LayerStats:
        if name not in self.layers:
            raise StatsError(
                f"{self.source}: no entry for {name!r}{nearest(name, self.layers)}; "
                "the file must be of the same network, measured with 'qtool calibrate'"
            )
        return self.layers[name]


_RECALIBRATE = "run 'qtool calibrate' again"
_NUMBERS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
_FIELD_NAMES = tuple(f.name for f in fields(ActivationStats) if f.compare)


def write_stats(stats: ModelStats) -> str:
    """The text of a stats YAML."""
    tree: dict[str, Any] = {} if stats.fingerprint is None else {HEADER: _header_tree(stats.fingerprint)}
    tree |= {
        name: {
            **({"inputs": {i: _record_tree(r) for i, r in layer.inputs.items()}} if layer.inputs else {}),
            **({"output": _record_tree(layer.output)} if layer.output is not None else {}),
        }
        for name, layer in stats.layers.items()
    }
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False))


def _header_tree(fingerprint: Fingerprint) -> dict[str, Any]:
    return {"fingerprint": fingerprint_tree(fingerprint)}


def _record_tree(record: ActivationStats) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in _FIELD_NAMES}
    if record.shape is not None:
        values["shape"] = str(tuple(record.shape))
    return {name: value for name, value in values.items() if value is not None}


def read_stats(path: Path) -> ModelStats:
    """Read a stats YAML.

    Raises:
        StatsError: if the file cannot be read, is not YAML, or holds anything but records; all
            malformed records are reported together (the first few), each by layer and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_depth(text)
        tree = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise StatsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StatsError(f"{path}: not a text file; a stats YAML is wanted") from error
    # A wrong tag, such as `!!int ""`, ends in a LookupError or AttributeError.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise StatsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise StatsError(f"{path}: no layers found; a mapping of layer names to records is wanted")
    problems: list[str] = []
    fingerprint = _read_header(tree.pop(HEADER, None), problems)
    layers = {str(name): _read_layer(str(name), node, problems) for name, node in tree.items()}
    if problems:
        rest = f"\n... and {len(problems) - 5} more such problems" if len(problems) > 5 else ""
        raise StatsError("\n".join(f"{path}: {p}" for p in problems[:5]) + rest)
    return ModelStats(layers, str(path), fingerprint)


def _check_depth(text: str) -> None:
    """Refuse absurd nesting, for which the fast loader would crash the interpreter."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 100:
            raise ValueError("nested more than 100 levels deep")


def _read_header(node: Any, problems: list[str]) -> Fingerprint | None:
    if not isinstance(node, dict | None):
        problems.append(f"{HEADER}: found {_kind(node)}; a mapping is wanted")
    elif node is not None and node.get("fingerprint") is not None:
        try:
            return read_fingerprint(node["fingerprint"])
        except ValueError as error:
            problems.append(f"{HEADER}.fingerprint: {error}")
    return None


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
        problems.append(f"{where}: found {value!r}; a finite number is wanted, {_RECALIBRATE}")
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


def records(stats: ModelStats) -> Iterator[tuple[str, ActivationStats]]:
    """Every record with its place: "conv1.inputs.0", "conv1.output"."""
    for name, layer in stats.layers.items():
        for index, record in layer.inputs.items():
            yield f"{name}.inputs.{index}", record
        if layer.output is not None:
            yield f"{name}.output", layer.output
