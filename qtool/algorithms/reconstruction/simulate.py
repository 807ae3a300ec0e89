"""A block of a quantized network with gradients: weights that are learned, grids whose scale is learned.

Between layers go the float values that the integers stand for; with decided weights the numbers are those
of the quantized network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.reconstruction.blocks import Block
from qtool.algorithms.reconstruction.grids import LearnedGrid, Masks, on_grid
from qtool.algorithms.rounding.grid import RowGrid, centered_rows, integers_of_rows
from qtool.algorithms.rounding.soft import SoftIntegers
from qtool.graph import ops
from qtool.graph.fold import output_channels_first, restore_layout
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.limits import activated
from qtool.quantizers.modules import weighted_function
from qtool.quantizers.plan import CAST, EMBEDDING, IDENTITY, INTEGER, WEIGHTED, LayerPlan
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
        self.traced, self.block, self.plans = traced, block, plans
        self.weights: dict[str, LearnedWeight] = {}
        self.outputs: dict[str, LearnedGrid] = {}
        self._fixed: dict[str, FixedWeight] = {}
        for node in block.nodes:
            name = node.meta.get("layer")
            if name is None:
                continue
            plan, module = plans[name], traced.get_submodule(name)
            if plan.op in WEIGHTED and plan.weight is not None:
                if name in block.layers:
                    self.weights[name] = LearnedWeight(module, plan)
                else:
                    self._fixed[name] = FixedWeight(module, plan)
            if plan.output is not None:
                # Approximated scales are not for gradients to choose.
                learn = learn_scales and plan.everywhere_bits is None and plan.scale_approx_bits is None
                self.outputs[name] = LearnedGrid(plan.output, plan.activation, learn, plan.activation_limit)

    def __call__(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """What the block gives for values of its entry, (N, ...)."""
        values: dict[fx.Node, Any] = {self.block.entry: x}
        for node in self.block.nodes:
            name = node.meta.get("layer")
            values[node] = (
                self._layer(name, node, values, masks) if name is not None else self._other(node, values)
            )
        result: Tensor = values[self.block.exit]
        return result

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        return ops.attribute(self.traced, str(node.target)) if node.op == "get_attr" else values[node]

    def _arguments(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        return args, kwargs

    def _other(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = self._arguments(node, values)
        if node.op == "call_module":
            return self.traced.get_submodule(str(node.target))(*args, **kwargs)
        return ops.as_function(node)(*args, **kwargs)

    def _layer(self, name: str, node: fx.Node, values: Mapping[fx.Node, Any], masks: Masks | None) -> Tensor:
        plan = self.plans[name]
        if plan.kind == IDENTITY:
            return self._value(tensor_inputs(node)[0], values)  # type: ignore[no-any-return]
        values = {**values, **self._fresh(node, plan, values)}
        grid = self.outputs.get(name)
        if plan.kind == INTEGER and plan.op in ("add", "cat"):
            assert grid is not None
            return self._combined(node, grid, values, masks)
        y = self._computed(name, node, plan, values)
        if grid is None:
            return activated(y, plan.activation, plan.activation_limit)
        return grid(y, masks)

    def _fresh(self, node: fx.Node, plan: LayerPlan, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
        """The inputs that this layer puts on a grid of its own."""
        pairs = zip(tensor_inputs(node), plan.inputs, strict=False)
        return {
            source: LearnedGrid(own, None, False)(self._value(source, values))
            for source, own in pairs
            if own is not None
        }

    def _computed(self, name: str, node: fx.Node, plan: LayerPlan, values: Mapping[fx.Node, Any]) -> Tensor:
        """What a layer gives before it is put on a grid."""
        weighted = self.weights.get(name) or self._fixed.get(name)
        if weighted is None:
            args, kwargs = self._arguments(node, values)
            result: Tensor = self.traced.get_submodule(name)(*args, **kwargs)
            return result
        x = self._value(tensor_inputs(node)[0], values)
        y = weighted_function(weighted.module)(x, weighted.weight(), None)
        bias = weighted.bias()
        if bias is None:
            return y
        if plan.kind == INTEGER:
            # It is an integer of the accumulator, whose steps can be large when weights have few bits.
            step = self._accumulator_step(node, plan)
            bias = on_grid(bias / step, torch.ones(()), -math.inf, math.inf) * step
        return y + (bias if plan.op == "linear" else bias.reshape(-1, *[1] * (y.dim() - 2)))

    def _accumulator_step(self, node: fx.Node, plan: LayerPlan) -> Tensor:
        """What a step of a layer's accumulator is worth, () or (C,); it follows the grid that is read."""
        assert plan.accum_scale is not None
        source = tensor_inputs(node)[0]
        while source in self.block.nodes and self._hands_on(source):
            source = tensor_inputs(source)[0]
        grid = self.outputs.get(source.meta.get("layer", "")) if plan.inputs[0] is None else None
        ratio = 1.0 if grid is None else grid.log_ratio.detach().exp()
        return (plan.accum_scale * ratio).float()

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a node gives what it reads, on the same grid."""
        name = node.meta.get("layer")
        return node.meta["op"] in ops.KEEPS_GRID if name is None else self.plans[name].kind == IDENTITY

    def _combined(
        self, node: fx.Node, grid: LearnedGrid, values: Mapping[fx.Node, Any], masks: Masks | None
    ) -> Tensor:
        if node.meta["op"] == "add":
            return grid.added([self._value(source, values) for source in tensor_inputs(node)], masks)
        # Rounding each tensor and concatenating them is concatenating and rounding.
        args, kwargs = self._arguments(node, values)
        return grid(self.traced.get_submodule(str(node.target))(*args, **kwargs), masks)


def cannot_simulate(block: Block, plans: Mapping[str, LayerPlan]) -> str:
    """Why a block cannot run with gradients, or ""."""
    for node in block.nodes:
        name = node.meta.get("layer")
        if name is not None and plans[name].kind in (EMBEDDING, CAST):
            return f"{name} in its block has no gradients: {plans[name].kind}"
        if "guard" in node.meta:
            return "its block runs only where values decide so"
    return ""
