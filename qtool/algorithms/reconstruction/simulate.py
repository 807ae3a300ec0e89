"""A block of a quantized network with gradients: weights that are learned, grids whose scale is learned.

With decided weights the numbers are those of the quantized network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.reconstruction.blocks import Block
from qtool.algorithms.reconstruction.grids import LearnedGrid
from qtool.algorithms.rounding.grid import RowGrid, centered_rows, integers_of_rows
from qtool.algorithms.rounding.soft import SoftIntegers
from qtool.algorithms.simulation import Masks, SimulatedGrid, SimulatedWeight, Simulation
from qtool.graph.fold import output_channels_first, restore_layout
from qtool.quantizers.plan import CAST, EMBEDDING, WEIGHTED, LayerPlan
from qtool.quantizers.plan.derived import hands_on_grid, value_grids
from qtool.quantizers.weights import weight_values


class LearnedWeight:
    """A layer whose integers, and bias if it has one, are learned.

    Args:
        module: the float layer of the network that is quantized.
        plan: its own.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        assert plan.weight is not None and plan.weight_q is not None
        self.module, self.plan = module, plan
        self.grid = RowGrid.of(plan.weight, plan.weight_q.shape[0], 1)
        wanted = output_channels_first(module).detach().double().reshape(1, plan.weight_q.shape[0], -1)
        start = centered_rows(plan.weight, plan.weight_q, 1)
        self.integers = SoftIntegers(wanted / self.grid.scale, start, self.grid.low, self.grid.high)
        bias = getattr(module, "bias", None)
        self.start_bias: Tensor | None = None if bias is None else bias.detach().float()
        # In steps of the weights, so that one learning rate fits all layers.
        self.reach = self.grid.scale.mean(dim=(0, 2)).float()
        self.shift = None if bias is None else torch.zeros_like(self.reach, requires_grad=True)
        self.decided: tuple[Tensor, Tensor | None] | None = None

    def weight(self) -> Tensor:
        """Its values in the layer's own layout: soft, or those that were decided."""
        assert self.plan.weight is not None and self.plan.weight_q is not None
        if self.decided is not None:
            return restore_layout(weight_values(self.plan.weight, self.decided[0]), self.module)
        values = self.integers.soft() * self.grid.scale.float()
        return restore_layout(values.reshape(self.plan.weight_q.shape), self.module)

    def bias(self) -> Tensor | None:
        """(C,), None if it has none."""
        if self.decided is not None:
            return self.decided[1]
        if self.start_bias is None or self.shift is None:
            return None
        bias: Tensor = self.start_bias + self.shift * self.reach
        return bias

    def moved(self) -> float:
        """Its grid stays."""
        return 1.0

    def result(self) -> tuple[Tensor, Tensor | None]:
        """The integers as the plan keeps them, and the bias."""
        assert self.plan.weight is not None and self.plan.weight_q is not None
        weight_q = integers_of_rows(self.plan.weight, self.integers.hard(), self.plan.weight_q.shape)
        with torch.no_grad():
            return weight_q, self.bias()

    def start(self) -> tuple[Tensor, Tensor | None]:
        """What result gave before anything was learned."""
        assert self.plan.weight_q is not None
        return self.plan.weight_q, self.start_bias


class FixedWeight:
    """A layer with integers that stay."""

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        self.module, self.plan = module, plan

    def weight(self) -> Tensor:
        assert self.plan.weight is not None and self.plan.weight_q is not None
        return restore_layout(weight_values(self.plan.weight, self.plan.weight_q), self.module)

    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    def moved(self) -> float:
        """Its grid stays."""
        return 1.0


class SimulatedBlock:
    """A block that runs with gradients.

    Args:
        traced: the float network that is quantized.
        block: part of its graph.
        plans: of its layers.
        learn_scales: whether the scales of outputs are learned too.

    Attributes:
        weights: the learned layers, by name.
        outputs: the grids of outputs, by layer.
    """

    def __init__(
        self, traced: fx.GraphModule, block: Block, plans: Mapping[str, LayerPlan], learn_scales: bool
    ) -> None:
        self.block = block
        self.weights: dict[str, LearnedWeight] = {}
        self.outputs: dict[str, LearnedGrid] = {}
        fixed: dict[str, SimulatedWeight] = {}
        fresh: dict[tuple[str, int], SimulatedGrid] = {}
        handed_on = hands_on_grid(value_grids(traced, plans), plans)
        for node in block.nodes:
            name = node.meta.get("layer")
            if name is None:
                continue
            plan, module = plans[name], traced.get_submodule(name)
            if plan.op in WEIGHTED and plan.weight is not None:
                if name in block.layers:
                    self.weights[name] = LearnedWeight(module, plan)
                else:
                    fixed[name] = FixedWeight(module, plan)
            if plan.output is not None and name not in handed_on:
                # Approximated scales are not for gradients to choose.
                learn = learn_scales and plan.everywhere_bits is None and plan.scale_approx_bits is None
                self.outputs[name] = LearnedGrid(plan.output, plan.activation, learn, plan.activation_limit)
            grids = ((index, own) for index, own in enumerate(plan.inputs) if own is not None)
            fresh |= {(name, index): LearnedGrid(own, None, False) for index, own in grids}
        self._simulation = Simulation(traced, block.nodes, plans, fixed | self.weights, self.outputs, fresh)

    def __call__(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """What the block gives for values of its entry, (N, ...)."""
        result: Tensor = self._simulation.run({self.block.entry: x}, masks)[self.block.exit]
        return result


def cannot_simulate(block: Block, plans: Mapping[str, LayerPlan]) -> str:
    """Why a block cannot run with gradients, or ""."""
    for node in block.nodes:
        name = node.meta.get("layer")
        if name is not None and plans[name].kind in (EMBEDDING, CAST):
            return f"{name} in its block has no gradients: {plans[name].kind}"
        if "guard" in node.meta:
            return "its block runs only where values decide so"
    return ""
