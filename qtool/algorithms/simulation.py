"""A part of a quantized network with gradients, up to the whole of it.

Between layers go the float values that the integers stand for; where weights and grids are those of the
plan, the numbers are those of the quantized network, up to values that lie between two steps. What weights
and grids are, and what of them is learned, is the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Size, Tensor, fx, nn

from qtool.graph import ops
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.limits import activated
from qtool.quantizers.plan import FAKE, IDENTITY, INTEGER, LayerPlan
from qtool.quantizers.weighted import weighted_function

# Gives, for a shape, 1.0 where a value goes on its grid and 0.0 where it stays off it.
Masks = Callable[[Size], Tensor]


class SimulatedWeight(Protocol):
    """The weight and bias of a layer."""

    module: nn.Module

    def weight(self) -> Tensor:
        """Its values, in the layer's own layout."""

    def bias(self) -> Tensor | None:
        """(C,), before it is rounded to the accumulator's steps; None if there is none."""

    def moved(self) -> Tensor | float:
        """Its scale over that of the plan, () or (C,), without gradients."""


class SimulatedGrid(Protocol):
    """The grid of an output, or of an input that arrives in float."""

    def __call__(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """The values of x behind the layer's activation, on the grid, or where the mask says so off it."""

    def added(self, tensors: list[Tensor], masks: Masks | None = None) -> Tensor:
        """The sum of tensors, each brought to this grid's scale first."""

    def moved(self) -> Tensor | float:
        """Its scale over that of the plan, (), without gradients."""


class Simulation:
    """Nodes of a graph that run with gradients.

    Args:
        traced: the float network that is quantized.
        nodes: in order; those of one part.
        plans: of its layers.
        weights: of layers, by name; the modules of the others are run as they are.
        outputs: the grids of outputs, by layer; a layer that computes in float, and whose grid is left out
            here, hands on values on the grid that it reads.
        fresh: those of inputs that arrive in float, by layer and number of the input.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        nodes: Sequence[fx.Node],
        plans: Mapping[str, LayerPlan],
        weights: Mapping[str, SimulatedWeight],
        outputs: Mapping[str, SimulatedGrid],
        fresh: Mapping[tuple[str, int], SimulatedGrid],
    ) -> None:
        self.traced, self.nodes, self.plans = traced, tuple(nodes), plans
        self.weights, self.outputs, self.fresh = weights, outputs, fresh
        self._inside = frozenset(nodes)

    def run(self, values: Mapping[fx.Node, Any], masks: Masks | None = None) -> dict[fx.Node, Any]:
        """The values of all nodes, given those that they read from elsewhere."""
        found = dict(values)
        for node in self.nodes:
            name = node.meta.get("layer")
            found[node] = self._other(node, found) if name is None else self._layer(name, node, found, masks)
        return found

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        return ops.attribute(self.traced, str(node.target)) if node.op == "get_attr" else values[node]

    def _arguments(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        return args, kwargs

    def _other(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._value(node, values)
        args, kwargs = self._arguments(node, values)
        if node.op == "call_module":
            return self.traced.get_submodule(str(node.target))(*args, **kwargs)
        return ops.as_function(node)(*args, **kwargs)

    def _layer(self, name: str, node: fx.Node, values: Mapping[fx.Node, Any], masks: Masks | None) -> Any:
        plan = self.plans[name]
        if plan.kind == IDENTITY:
            return self._value(tensor_inputs(node)[0], values)
        values = {**values, **self._on_fresh_grids(name, node, values)}
        grid = self.outputs.get(name)
        if plan.kind == INTEGER and plan.op in ("add", "cat"):
            assert grid is not None
            return self._combined(node, grid, values, masks)
        y = self._computed(name, node, plan, values)
        if grid is not None:
            return grid(y, masks)
        if plan.activation is None:
            return y
        limit = plan.activation_limit
        return activated(y, plan.activation, None if limit is None else limit.to(y.device))

    def _on_fresh_grids(
        self, name: str, node: fx.Node, values: Mapping[fx.Node, Any]
    ) -> dict[fx.Node, Tensor]:
        """The inputs that this layer puts on a grid of its own."""
        return {
            source: self.fresh[name, index](self._value(source, values))
            for index, source in enumerate(tensor_inputs(node))
            if (name, index) in self.fresh
        }

    def _computed(self, name: str, node: fx.Node, plan: LayerPlan, values: Mapping[fx.Node, Any]) -> Any:
        """What a layer gives before it is put on a grid."""
        weighted = self.weights.get(name)
        if weighted is None:
            args, kwargs = self._arguments(node, values)
            return self.traced.get_submodule(name)(*args, **kwargs)
        x = self._value(tensor_inputs(node)[0], values)
        y = weighted_function(weighted.module)(x, weighted.weight(), None)
        bias = weighted.bias()
        if bias is None:
            return y
        if plan.kind == INTEGER:
            # It is an integer of the accumulator, whose steps can be large when weights have few bits.
            bias = _rounded(bias, self._accumulator_step(name, node, plan, weighted))
        return y + (bias if plan.op == "linear" else bias.reshape(-1, *[1] * (y.dim() - 2)))

    def _accumulator_step(
        self, name: str, node: fx.Node, plan: LayerPlan, weighted: SimulatedWeight
    ) -> Tensor:
        """What a step of a layer's accumulator is worth, () or (C,); it follows the grids that it is of."""
        assert plan.accum_scale is not None
        grid = self.fresh.get((name, 0)) or self._grid_of(tensor_inputs(node)[0])
        moved = weighted.moved() * (1.0 if grid is None else grid.moved())
        scale = plan.accum_scale.to(moved.device) if isinstance(moved, Tensor) else plan.accum_scale
        return (scale * moved).float()

    def _grid_of(self, node: fx.Node) -> SimulatedGrid | None:
        """The grid of a value; None where it comes from elsewhere."""
        while node in self._inside and self._hands_on(node):
            node = tensor_inputs(node)[0]
        return self.outputs.get(node.meta.get("layer", ""))

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether a node gives what it reads, on the same grid."""
        name = node.meta.get("layer")
        if name is None:
            return node.meta["op"] in ops.KEEPS_GRID
        plan = self.plans[name]
        return plan.kind == IDENTITY or (
            plan.kind == FAKE and plan.output is not None and name not in self.outputs
        )

    def _combined(
        self, node: fx.Node, grid: SimulatedGrid, values: Mapping[fx.Node, Any], masks: Masks | None
    ) -> Tensor:
        if node.meta["op"] == "add":
            summands = [self._value(source, values) for source in tensor_inputs(node)]
            if self.plans[node.meta["layer"]].sum_once:
                return grid(functools.reduce(torch.add, summands), masks)
            return grid.added(summands, masks)
        # Rounding each tensor and concatenating them is concatenating and rounding.
        args, kwargs = self._arguments(node, values)
        return grid(self.traced.get_submodule(str(node.target))(*args, **kwargs), masks)


def _rounded(x: Tensor, step: Tensor) -> Tensor:
    """x on multiples of step; the gradient is passed straight through."""
    steps = x / step
    return (steps + (steps.round() - steps).detach()) * step
