"""The ranges that a search moves: where they start, and the specs that a vector of octaves stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qtool.algorithms.lapq.methods import Vector, smallest
from qtool.algorithms.lapq.pnorm import lp_error
from qtool.algorithms.lapq.records import LapqSpec, Specs
from qtool.errors import ConfigError
from qtool.graph.fold import output_channels_first
from qtool.graph.neighbours import following_op
from qtool.graph.trace import layers
from qtool.numerics.clipping import range_of_tensor
from qtool.numerics.spec import ACIQ_MAX_BITS, ClipSpec, LayerSpec, QuantSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.plan import FAKE, INTEGER, WEIGHTS_ONLY, LayerPlan, output_ranges, plan_model

CLIPPED_STARTS = ("none", "avg", "gauss", "laplace")
# Values of one tensor that its p-norm is computed on.
SAMPLE = 1 << 15
# Ranges stay within 2^-16 and 2^16 of where they start.
MAX_OCTAVES = 16.0
# Steps of an octave: a range moves by 1.1 % at least.
STEPS = 64


@dataclass(frozen=True)
class SearchedTensor:
    """A weight or an output whose range is searched.

    The search speaks of octaves: at o the range is 2^o times the one at 0. Octaves are rounded to
    steps, so that a search that goes on below them finds a loss that is known already.

    Args:
        layer: whose it is.
        part: "weight" or "output".
        grid: what it is quantized to.
        low, high: a range around zero, shape () or, per channel, (C,).
        factors: by which low and high are multiplied at 0 octaves.
        numbers: 1 if both ends move together, 2 if each has octaves of its own.
        values: some of its values, (C, n) or (n,).
    """

    layer: str
    part: str
    grid: QuantSpec
    low: Tensor
    high: Tensor
    factors: tuple[float, float]
    numbers: int
    values: Tensor

    def fit(self, p: float, method: str) -> list[float]:
        """The octaves of the smallest error in the p-norm, found by a method of SciPy's."""
        start = np.zeros(self.numbers)
        unit = self.error_at(start, p) or 1.0  # some methods stop at an absolute difference
        known: dict[tuple[float, float], float] = {}

        def error(octaves: Vector) -> float:
            factors = self.factors_at(octaves)
            if factors not in known:
                known[factors] = self.error_at(octaves, p) / unit
            return known[factors]

        return [float(octave) for octave in smallest(error, start, method)]

    def factors_at(self, octaves: Vector) -> tuple[float, float]:
        """The factors on low and high."""
        rounded = np.round(np.clip(octaves, -MAX_OCTAVES, MAX_OCTAVES) * STEPS) / STEPS
        first, last = (2.0 ** float(rounded[i]) for i in (0, -1))
        return self.factors[0] * first, self.factors[1] * last

    def error_at(self, octaves: Vector, p: float) -> float:
        """What quantization with this range costs the values, see lp_error."""
        low, high = self.factors_at(octaves)
        return lp_error(self.values, self.low * low, self.high * high, self.grid, p)

    def asked_at(self, octaves: Vector) -> dict[str, tuple[float, float]]:
        """The fields of a LayerSpec that give it this range."""
        low, high = self.factors_at(octaves)
        if self.part == "weight":
            return {"weight_range_factors": (low, high)}
        return {"output_range": (float(self.low) * low, float(self.high) * high)}


def with_ranges(specs: Specs, tensors: Sequence[SearchedTensor], vector: Vector) -> dict[str, LayerSpec]:
    """The specs with every searched range as a vector of octaves says."""
    changed = dict(specs)
    for tensor, octaves in zip(tensors, split(vector, tensors), strict=True):
        changed[tensor.layer] = replace(changed[tensor.layer], **tensor.asked_at(octaves))  # type: ignore[arg-type]
    return changed


def split(vector: Vector, tensors: Sequence[SearchedTensor]) -> list[Vector]:
    """The part of a vector that belongs to each tensor."""
    return np.split(vector, np.cumsum([t.numbers for t in tensors])[:-1])


def sample_outputs(traced: fx.GraphModule, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Up to SAMPLE values of each layer's output, evenly spaced, by layer name.

    Args:
        traced: the float network, batch norms folded, on the device of the batches.
        batches: its inputs.
    """
    parts: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                parts.setdefault(name, []).append(_thinned(output.reshape(-1), SAMPLE // len(batches)))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, _, module in layers(traced)]
    try:
        with torch.no_grad():
            for batch in batches:
                traced(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found).cpu() for name, found in parts.items()}


def _thinned(x: Tensor, count: int) -> Tensor:
    """At most about count values along the last axis, evenly spaced."""
    return x[..., :: -(-x.shape[-1] // max(1, count))].clone()


def searched_tensors(
    traced: fx.GraphModule,
    stats: ModelStats,
    specs: Specs,
    outputs: Mapping[str, Tensor],
    settings: LapqSpec,
) -> list[SearchedTensor]:
    """Every weight and output on a grid, in the order of execution.

    Args:
        traced, stats: batch norms folded.
        specs: without clipping.
        outputs: from sample_outputs.
        settings: init_mode says where the ranges start, both_ends how many numbers each has.

    Raises:
        ConfigError: if there are none.
    """
    clip = settings.init_mode if settings.init_mode in CLIPPED_STARTS else "none"
    planned = plan_model(traced, stats, specs).layers
    ranges = output_ranges(traced, stats, {name: _clipped(spec, clip) for name, spec in specs.items()})
    found = []
    for name, node, module in layers(traced):
        plan = planned[name]
        if plan.kind in (INTEGER, WEIGHTS_ONLY) and plan.weight is not None:
            found.append(_searched_weight(name, module, specs[name], clip, settings.both_ends))
        if plan.kind in (INTEGER, FAKE) and plan.output is not None:
            # Limits of single channels cannot be found again in a sample of all: the activation's own is.
            reader = following_op(node) if plan.activation_limit is not None and plan.activation else None
            source = name if reader is None else reader[1].meta["layer"]
            found.append(_searched_output(name, plan, ranges[name], outputs[source], settings.both_ends))
    if not found:
        raise ConfigError("nothing to search: no layer is quantized")
    return found


def _clipped(spec: LayerSpec, mode: str) -> LayerSpec:
    """The spec with outputs clipped, where the mode has constants for their grid."""
    possible = spec.output is None or spec.output.num_bits <= ACIQ_MAX_BITS
    return replace(spec, clip=replace(spec.clip, mode=mode if possible else "none"))


def _searched_weight(
    name: str, module: nn.Module, spec: LayerSpec, clip: str, both_ends: bool
) -> SearchedTensor:
    grid, weight = spec.weight, output_channels_first(module).detach()
    assert grid is not None
    low, high = _around_zero(*range_of_tensor(weight, grid))
    factors = spec.weight_range_factors or (1.0, 1.0)
    if clip != "none" and grid.axis is None and grid.num_bits <= ACIQ_MAX_BITS:
        how = ClipSpec(clip, to_observed=spec.clip.to_observed)
        clipped = _around_zero(*range_of_tensor(weight, grid, how))
        if grid.symmetric:
            factors = (_quotient(max(-clipped[0], clipped[1]), max(-low, high)),) * 2
        else:
            factors = (_quotient(clipped[0], low), _quotient(clipped[1], high))
    rows = weight.flatten(1)
    values = _thinned(rows, SAMPLE // len(rows))
    numbers = _numbers(grid, float(low.min()), float(high.max()), both_ends)
    return SearchedTensor(name, "weight", grid, low, high, factors, numbers, values)


def _searched_output(
    name: str, plan: LayerPlan, found: tuple[float, float], values: Tensor, both_ends: bool
) -> SearchedTensor:
    assert plan.output is not None
    low, high = _around_zero(torch.tensor(found[0]), torch.tensor(found[1]))
    if plan.activation is not None:  # it is quantized behind its activation
        plain = plan.activation == "relu6" and plan.activation_limit is None
        values = values.clamp(0, 6 if plain else None)
    numbers = _numbers(plan.output.spec, float(low), float(high), both_ends)
    return SearchedTensor(name, "output", plan.output.spec, low, high, (1.0, 1.0), numbers, values)


def _numbers(grid: QuantSpec, low: float, high: float, both_ends: bool) -> int:
    return 2 if both_ends and not grid.symmetric and low < 0 < high else 1


def _around_zero(x_min: Tensor, x_max: Tensor) -> tuple[Tensor, Tensor]:
    """The range widened to hold zero, as every grid does."""
    return x_min.clamp(max=0), x_max.clamp(min=0)


def _quotient(a: Tensor, b: Tensor) -> float:
    return float(a) / float(b) if float(b) and float(a) else 1.0
