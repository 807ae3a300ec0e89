"""The grids of inputs and outputs, from the statistics of a network and what is asked of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from qtool.errors import ConfigError, StatsError
from qtool.graph.neighbours import FUSIBLE
from qtool.numerics.affine import qparams_from_range
from qtool.numerics.clipping import choose_range
from qtool.numerics.spec import ACIQ_MODES, ClipSpec, InputSpec, LayerSpec, QParams, QuantSpec
from qtool.observers.stats import ActivationStats, ModelStats
from qtool.quantizers.plan.asked import asked_of_output


class Grids:
    """Chooses the grids of one network.

    Args:
        stats: of the network, edited for what follows each layer.
        fused: the activations that layers take over, by layer.
        never_negative: from asked.find_never_negative.
    """

    def __init__(
        self, stats: ModelStats, fused: Mapping[str, tuple[str, str]], never_negative: Set[fx.Node]
    ) -> None:
        self.stats = stats
        self.fused = fused
        self.never_negative = never_negative

    def of_input(self, name: str, index: int, asked: InputSpec, spec: LayerSpec) -> QParams:
        """The grid of an input that arrives in float, from this layer's own record of it."""
        what = f"input {index} of layer {name!r}"
        x_min, x_max = self._range(what, self.stats.input(name, index), asked.grid, asked.clip)
        return self._qparams(what, x_min, x_max, asked.grid, spec)

    def of_output(self, name: str, node: fx.Node, spec: LayerSpec) -> QParams:
        """The grid of a layer's output."""
        x_min, x_max = self.output_range(name, node, spec)
        grid = asked_of_output(node, spec, self.never_negative)
        return self._qparams(f"the output of layer {name!r}", x_min, x_max, grid, spec)

    def _qparams(self, what: str, x_min: Tensor, x_max: Tensor, grid: QuantSpec, spec: LayerSpec) -> QParams:
        try:
            return qparams_from_range(x_min, x_max, grid, spec.scale_approx_bits)
        except ValueError as error:  # numbers at the end of float32's range
            raise StatsError(f"{self.stats.source}: {what}: {error}") from error

    def output_range(self, name: str, node: fx.Node, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """The range of a layer's output: the one asked for, or one from the edited statistics."""
        if spec.output_range is not None:
            x_min, x_max = (torch.tensor(float(v)) for v in spec.output_range)
            return x_min, x_max
        record, clip = self.stats.output(name), spec.clip
        if name in self.fused:
            clip = replace(clip, half_range=True)
        elif node.meta["op"] in FUSIBLE:
            clip = replace(clip, half_range=True)
            if clip.mode in ACIQ_MODES:
                # The distribution that ACIQ's half range describes is the one in front of the ReLU.
                before = self.stats.input(name, 0)
                record = replace(record, mean=before.mean, std=before.std, b=before.b)
        grid = asked_of_output(node, spec, self.never_negative)
        return self._range(f"the output of layer {name!r}", record, grid, clip)

    def _range(
        self, what: str, record: ActivationStats, grid: QuantSpec, clip: ClipSpec
    ) -> tuple[Tensor, Tensor]:
        try:
            return choose_range(record, grid, clip)
        except ValueError as error:
            if "needs" in str(error):
                raise StatsError(f"{self.stats.source}: {what}: {error}") from error
            raise ConfigError(f"{what}: {error}") from error
