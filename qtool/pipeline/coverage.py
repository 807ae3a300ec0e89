"""How much of a network's work is quantized: the share of its multiply-accumulates, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from qtool.graph.fold import fold_batch_norms
from qtool.graph.macs import count_macs
from qtool.graph.trace import layers
from qtool.numerics.spec import LayerSpec
from qtool.quantizers import plan as plans
from qtool.quantizers.plan import layer_kind

# The largest layers that stay in float are named, so many of them.
NAMED = 10
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Coverage:
    """The work of a network for one input, and how much of it runs on integers.

    Args:
        total: multiply-accumulates with a known count.
        quantized: those that run on integers.
        left: name -> (multiply-accumulates, why) of each layer that does not; None where not known.
    """

    total: float
    quantized: float
    left: Mapping[str, tuple[float | None, str]]

    @property
    def percent(self) -> float:
        """The share that is quantized; 100 for a network without any."""
        return 100 * self.quantized / self.total if self.total else 100.0

    @property
    def text(self) -> str:
        """The summary for a terminal."""
        # Rounded down: 99.99 % must not read as all of it.
        share = f"{int(self.percent * 10) / 10:.1f} %"
        lines = [f"{share} of {_with_prefix(self.total)} multiply-accumulates run quantized"]
        ordered = sorted(self.left.items(), key=lambda item: -(item[1][0] or 0.0))
        for name, (count, why) in ordered[:NAMED]:
            size = "an unknown number" if count is None else _with_prefix(count)
            lines.append(f"not: {name}, {size} ({why})")
        if len(ordered) > NAMED:
            lines.append(f"not: {len(ordered) - NAMED} smaller ones")
        return "\n".join(lines)


def coverage(traced: fx.GraphModule, specs: Mapping[str, LayerSpec]) -> Coverage:
    """The coverage of a network that is quantized as specs ask.

    Args:
        traced: from graph.trace.trace.
        specs: what is asked, by layer name.
    """
    folded = fold_batch_norms(traced).traced
    macs = count_macs(folded)
    total = quantized = 0.0
    left: dict[str, tuple[float | None, str]] = {}
    for name, node, _ in layers(folded):
        work = macs.get(name)
        if work is None:
            continue
        spec = specs.get(name)
        kind, why = layer_kind(node, spec, fused_away=False)
        total += work.count
        # What its accumulator holds may go back to float; with a grid for inputs it multiplies integers.
        reads_integers = spec is not None and spec.input is not None
        if kind == plans.INTEGER or (kind == plans.WEIGHTS_ONLY and reads_integers):
            quantized += work.count
        else:
            left[name] = (work.count if work.known else None, why or _WHY.get(kind, kind))
    return Coverage(total, quantized, left)


_WHY = {
    plans.FAKE: "computes in float, its output is put on a grid",
    plans.WEIGHTS_ONLY: "only its weights are quantized",
    plans.EMBEDDING: "rows of a table",
}


def _with_prefix(count: float) -> str:
    for size, prefix in _PREFIXES:
        if count >= size:
            return f"{count / size:.1f} {prefix}"
    return f"{count:.0f}"
