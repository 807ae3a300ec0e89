"""How the sensitivity of groups is shown and written: a table with bars, YAML, CSV, overrides."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import yaml
from torch import fx

from qtool.config import QuantizeConfig, with_bits, with_bits_of_layers
from qtool.config.sections.sensitivity import DAMAGE
from qtool.graph.trace import layers
from qtool.numerics.metrics import ratio_db
from qtool.pipeline import steps
from qtool.pipeline.sensitivity.measuring import Row
from qtool.quantizers.plan import WEIGHTED
from qtool.search.groups import Group
from qtool.search.sensitivity.scores import KL, LOSS, SQNR, Score

BAR = 30
# Layers of a group that the table names.
NAMED = 3
EIGHT_BITS = 8
# Heading of the column that is sorted by, for each direction; columns are 12 wide.
HEADINGS = {
    SQNR: ("SQNR, dB", "gain, dB"),
    KL: ("KL, nats", "less KL"),
    LOSS: ("more loss", "less loss"),
    "top1": ("top-1 lost", "top-1 won"),
}


def value_of(row: Row, metric: str) -> float:
    """The number that the table and the files show: dB where the metric is an SQNR."""
    if metric != SQNR:
        return row.worth(metric)
    noise = row.score.harm(SQNR)
    return ratio_db(1.0 if row.whole is None else row.whole.harm(SQNR), noise)


def tables(rows: Sequence[Row], metric: str) -> str:
    """A table for each direction and number of bits, what hurts most first."""
    return "\n\n".join(
        _table(list(part), metric) for _, part in groupby(rows, key=lambda r: (r.bits, r.direction))
    )


def _table(rows: Sequence[Row], metric: str) -> str:
    damage = rows[0].direction == DAMAGE
    what = "damage when only this is quantized" if damage else "gain when only this is left in float"
    bits = (
        ""
        if rows[0].bits is None
        else f" to {rows[0].bits} bits"
        if damage
        else f", else {rows[0].bits} bits"
    )
    how = ", estimated" if rows[0].estimated else ""
    width = max(len(_called(row.group)) for row in rows)
    worth = [max(row.worth(metric), 0.0) for row in rows]
    largest = max(worth) or 1.0
    lines = [f"{what}{bits}{how}", f"{'group':<{width}}{HEADINGS[metric][not damage]:>12}"]
    for row, share in zip(rows, worth, strict=True):
        bar = "█" * math.ceil(BAR * (share / largest)) if math.isfinite(share) else "█" * BAR
        lines.append(f"{_called(row.group):<{width}}{value_of(row, metric):>12.4g}  {bar}".rstrip())
    return "\n".join(lines)


def _called(group: Group) -> str:
    """A group in the table: its layers, the first three of many."""
    others = len(group.layers) - NAMED
    return ", ".join(group.layers[:NAMED]) + (f", {others} more" if others > 0 else "")


def as_yaml(rows: Sequence[Row], head: dict[str, Any], metric: str) -> str:
    """The whole measurement as YAML."""
    found = [
        {
            "group": row.group.name,
            "layers": list(row.group.layers),
            "bits": row.bits,
            "direction": row.direction,
            "how": "estimated" if row.estimated else "measured",
            **_numbers(row.score, "" if row.whole is None else "without_"),
            **({} if row.whole is None else {"gain": _finite(value_of(row, metric))}),
        }
        for row in rows
    ]
    whole = next((row.whole for row in rows if row.whole is not None), None)
    if whole is not None and len({row.bits for row in rows}) == 1:
        head = {**head, "all_quantized": _numbers(whole, "")}
    return yaml.safe_dump({**head, "groups": found}, sort_keys=False, allow_unicode=True)


COLUMNS = ("group", "layers", "bits", "direction", "how", "sqnr_db", "kl", "loss", "top1")


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each row: the scores of the network in which the group is treated so."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        numbers = _numbers(row.score, "")
        bits = "" if row.bits is None else row.bits
        how = "estimated" if row.estimated else "measured"
        cells = [numbers.get(name, "") for name in COLUMNS[5:]]
        writer.writerow([row.group.name, " ".join(row.group.layers), bits, row.direction, how, *cells])
    return file.getvalue()


def _numbers(score: Score, prefix: str) -> dict[str, float | None]:
    """What was measured, by name; an infinite SQNR is null, as no noise has no dB."""
    found = {"sqnr_db": score.sqnr_db, "kl": score.kl, "loss": score.loss, "top1": score.top1}
    return {f"{prefix}{name}": _finite(value) for name, value in found.items() if value is not None}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def overrides_for(
    rows: Sequence[Row], traced: fx.GraphModule, quantizers: QuantizeConfig, count: int
) -> dict[str, dict[str, int]]:
    """Overrides that give the worst groups more bits: 8 where they have fewer, else float.

    Args:
        rows: sorted; those of the first direction at the fewest bits count.
        traced: the float network.
        quantizers: what was measured.
        count: how many groups.
    """
    fewest = min((row.bits for row in rows if row.bits is not None), default=None)
    chosen = [row for row in rows if row.bits == fewest and row.direction == rows[0].direction][:count]
    settings = quantizers if fewest is None else with_bits(quantizers, fewest, fewest)
    specs = steps.specs_for(traced, settings)
    ops = {name: node.meta["op"] for name, node, _ in layers(traced)}
    found: dict[str, dict[str, int]] = {}
    for name in (name for row in chosen for name in row.group.layers):
        grids = {"bits_weights": specs[name].weight, "bits_activations": specs[name].output}
        if ops[name] not in WEIGHTED | {"embedding"}:
            del grids["bits_weights"]
        found[name] = {
            key: EIGHT_BITS if grid.num_bits < EIGHT_BITS else 0
            for key, grid in grids.items()
            if grid is not None
        }
    return {name: settings for name, settings in found.items() if settings}


def overridden(
    quantizers: QuantizeConfig, traced: fx.GraphModule, overrides: dict[str, dict[str, int]]
) -> QuantizeConfig:
    """The settings of the quantizer with these overrides, as a file for -c holds them."""
    return with_bits_of_layers(quantizers, [name for name, _, _ in layers(traced)], overrides)
