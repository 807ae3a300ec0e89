"""A statistics file as text: a table, with a small histogram of each tensor."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qtool.numerics.histogram import Histogram
from qtool.observers.files import read_stats
from qtool.observers.stats import ActivationStats, ModelStats, records
from qtool.pipeline.stats_records import STATISTICS, of_layers, produced, values

# Heights of a bar, from nothing to full.
BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII = " .:-=+*#@"
NUMBER_WIDTH = 10
MAX_BARS = 120


@dataclass(frozen=True)
class View:
    """How statistics are shown.

    Args:
        form: table, csv or yaml.
        linear: whether bars of a histogram are as high as their counts, rather than their logarithms.
        inputs: whether to list inputs that are another layer's output.
        width: characters of a line of the table.
        bars: characters of growing height, the first for an empty bin.
    """

    form: str = "table"
    linear: bool = False
    inputs: bool = False
    width: int = 100
    bars: str = BLOCKS


def show(file: Path, patterns: Sequence[str], view: View) -> str:
    """The statistics of some layers of a file, as text.

    Raises:
        StatsError: if the file cannot be read.
        ConfigError: if a pattern matches no layer.
    """
    stats = read_stats(file)
    (asked,) = of_layers(patterns, stats)
    chosen = list(listed(asked, view.inputs, produced(stats)))
    if view.form == "csv":
        return _csv(chosen)
    if view.form == "yaml":
        return _yaml(chosen)
    return _table(stats, chosen, view)


def listed(
    stats: ModelStats, inputs: bool, known: set[tuple[Any, ...]]
) -> Iterator[tuple[str, ActivationStats]]:
    """The records to show, with their places: outputs, and each input that no layer gives once.

    Args:
        stats: of the layers to show.
        inputs: whether to give every input.
        known: the values of what layers give, see stats_records.produced.
    """
    seen = set(known)
    for place, record in records(stats):
        if place.endswith(".output") or inputs:
            yield place, record
        elif values(record) not in seen:
            seen.add(values(record))
            yield place, record


def _csv(chosen: Sequence[tuple[str, ActivationStats]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("tensor", *STATISTICS, "elements", "shape"))
    for place, record in chosen:
        numbers = [getattr(record, name) for name in STATISTICS]
        writer.writerow((place, *numbers, record.total_numel, _shape(record)))
    return file.getvalue().removesuffix("\n")


def _yaml(chosen: Sequence[tuple[str, ActivationStats]]) -> str:
    tree = {
        place: {name: getattr(record, name) for name in STATISTICS}
        | {"elements": record.total_numel, "shape": _shape(record) or None}
        for place, record in chosen
    }
    return yaml.safe_dump(tree, sort_keys=False).removesuffix("\n")


def _shape(record: ActivationStats) -> str:
    return "" if record.shape is None else "x".join(str(n) for n in record.shape)


def _table(stats: ModelStats, chosen: Sequence[tuple[str, ActivationStats]], view: View) -> str:
    """Of each record a line, or two where the terminal is narrow, and its histogram."""
    counts = ["-" if r.total_numel is None else str(r.total_numel) for _, r in chosen]
    shapes = [_shape(record) or "-" for _, record in chosen]
    names, elements = _width("tensor", [place for place, _ in chosen]), _width("elements", counts)
    width = names + NUMBER_WIDTH * len(STATISTICS) + elements + _width("shape", shapes) + 3
    narrow = width > view.width

    def line(name: str, numbers: Sequence[str], count: str, shape: str) -> str:
        row = "".join(number.rjust(NUMBER_WIDTH) for number in numbers)
        ending = f" {count:>{elements}}  {shape}"
        return f"{name.ljust(names)}{ending}\n{row}" if narrow else f"{name.ljust(names)}{row}{ending}"

    lines = [line("tensor", STATISTICS, "elements", "shape")]
    for (place, record), count, shape in zip(chosen, counts, shapes, strict=True):
        lines.append(line(place, [_number(getattr(record, name)) for name in STATISTICS], count, shape))
        lines.append(f"  {_bars(record, view)}")
    if any(record.histogram is not None for _, record in chosen):
        lines.append(_legend(view))
    lines.append(f"{len(chosen)} tensors; {stats.source} has {len(stats.layers)} layers")
    if not chosen:
        lines.append("these layers have only inputs that other layers give; --inputs lists them")
    return "\n".join(lines)


def _width(title: str, texts: Sequence[str]) -> int:
    return max(len(text) for text in (title, *texts))


def _legend(view: View) -> str:
    heights = "counts" if view.linear else "logarithms of counts"
    return f"histograms: of a sample of the elements, from min to max; height: {heights}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _bars(record: ActivationStats, view: View) -> str:
    if record.histogram is None:
        return "(no histogram)"
    low, high = f"{record.min:.3g} ", f" {record.max:.3g}"
    width = max(8, min(view.width - 2 - len(low) - len(high), MAX_BARS))
    return f"{low}{bars_of(record.histogram, record.min, record.max, width, view)}{high}"


def bars_of(histogram: Histogram, low: float, high: float, width: int, view: View) -> str:
    """A histogram in so many characters over [low, high]; a bin that is not empty shows at least the lowest.

    Example:
        >>> bars_of(Histogram(0, 0, np.array([1, 0, 4, 2])), 0, 4, 4, View(linear=True, bars=ASCII))
        ': @='
    """
    counts = histogram.rebinned(low, high, width)
    heights = counts if view.linear else np.log1p(counts)
    top = max(float(heights.max()), 1e-30)
    steps = np.ceil(heights / top * (len(view.bars) - 1)).astype(int)
    return "".join(view.bars[step] for step in steps)
