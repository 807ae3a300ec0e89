"""One quantized layer inside a float network: floats in, the floats that its integers stand for out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.affine import dequantize_centered, quantize_centered
from qtool.numerics.spec import QParams
from qtool.quantizers.plan import FAKE, IDENTITY, INTEGER, ModelPlan
from qtool.quantizers.plan.derived import grids_read, value_grids
from qtool.quantizers.prepare import build_layer
from qtool.search.groups import QUANTIZED, Group, source_layer
from qtool.search.sensitivity.points import Point

Values = Mapping[fx.Node, Any]


class RoundedLayer:
    """A layer as its plan computes it, with the activation that it takes over.

    Args:
        network: the float network, in which it stands.
        traced: the one that the plan is of, which has the same nodes, by name.
        name: of the layer.
        point: its plan.
        grids: of every value under that plan.

    Attributes:
        node: the layer, in network.
        end: the node whose value it computes: its own, or that of the activation.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        traced: fx.GraphModule,
        name: str,
        point: Point,
        grids: Mapping[fx.Node, QParams | None],
    ) -> None:
        own = {layer: node for layer, node, _ in layers(traced)}
        self._places = {layer: (node, module) for layer, node, module in layers(network)}
        self.plan = point.plan.layers[name]
        self.node, self.module = self._places[name]
        read = grids_read(own[name], self.plan, grids)
        self._rounded = build_layer(self.module, self.plan, read, own[name]).eval()
        fresh = self.plan.inputs or (None,) * len(read)
        # For each input the grid on which it is read, and whether that rounding is this layer's own.
        self._read = [(grid, fresh[index] is not None) for index, grid in enumerate(read)]
        self._activations = [
            other
            for other in point.group.layers
            if point.plan.layers[other].kind == IDENTITY
            and source_layer(tensor_inputs(own[other])[0], point.plan.layers) == name
        ]
        self.end = self._places[self._activations[-1]][0] if self._activations else self.node

    def output(self, values: Values) -> Tensor:
        """What the rounded layer gives, in floats, for the float values of what it reads."""
        inputs = [self._on_grid(values[s], grid) for s, (grid, _) in self._pairs()]
        result: Tensor = self._call(self._rounded, values, inputs)
        return result if self.plan.output is None else dequantize_centered(result, self.plan.output)

    def instead(self) -> dict[fx.Node, Callable[[Values], Any]]:
        """What gives the values of this layer's nodes in place of running them (graph.replay.run_from)."""
        found: dict[fx.Node, Callable[[Values], Any]] = {self.node: self.output}
        for activation in self._activations:
            found[self._places[activation][0]] = self._as_it_is(self._places[activation][0])
        return found

    def _as_it_is(self, node: fx.Node) -> Callable[[Values], Any]:
        (source,) = tensor_inputs(node)
        return lambda values: values[source]

    def error(self, values: Values) -> Tensor:
        """What this layer's rounding adds to the value at end.

        A value that another layer of the group gives is rounded there: that rounding is not added again.
        """
        inputs = [values[s] for s in tensor_inputs(self.node)]
        if all(own or grid is None for grid, own in self._read):
            expected = values[self.end]
        else:
            rounded = [
                x if grid is None or own else dequantize_centered(quantize_centered(x, grid), grid)
                for x, (grid, own) in zip(inputs, self._read, strict=True)
            ]
            expected = self._call(self.module, values, rounded)
            for activation in self._activations:
                expected = self._places[activation][1](expected)
        error: Tensor = self.output(values) - expected
        return error

    def _pairs(self) -> Iterator[tuple[fx.Node, tuple[QParams | None, bool]]]:
        return zip(tensor_inputs(self.node), self._read, strict=True)

    def _on_grid(self, x: Tensor, grid: QParams | None) -> Tensor:
        if grid is None:
            return x
        x_q = quantize_centered(x, grid)
        return x_q if self.plan.kind == INTEGER else dequantize_centered(x_q, grid)

    def _call(self, module: Any, values: Values, inputs: list[Tensor]) -> Any:
        """Run a module as the node does, with other values for the float tensors that it reads."""
        waiting = iter(inputs)
        floats = set(tensor_inputs(self.node))

        def value(node: fx.Node) -> Any:
            return next(waiting) if node in floats else values[node]

        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), value)
        return module(*args, **kwargs)


def rounded_layers(network: fx.GraphModule, traced: fx.GraphModule, point: Point) -> list[RoundedLayer]:
    """The quantized layers of a point, in the order of execution.

    Args:
        network: the float network in which they stand.
        traced: the network that the point's plan is of.
        point: of which only the group is quantized.
    """
    grids = value_grids(traced, point.plan.layers)
    names = [name for name in point.group.layers if point.plan.layers[name].kind in QUANTIZED]
    return [RoundedLayer(network, traced, name, point, grids) for name in names]


class RoundedValue:
    """A value of the float network that is put on a grid.

    Args:
        end: the node that gives it, in the float network.
        grid: of the value.
    """

    def __init__(self, end: fx.Node, grid: QParams) -> None:
        self.end, self.grid = end, grid

    def error(self, values: Values) -> Tensor:
        """What rounding adds to the value."""
        x: Tensor = values[self.end]
        return dequantize_centered(quantize_centered(x, self.grid), self.grid) - x


def rounded_values(
    network: fx.GraphModule, traced: fx.GraphModule, plan: ModelPlan, group: Group
) -> list[RoundedValue]:
    """The values that layers of a group put on grids, apart from weights: outputs, and inputs of their own.

    Args:
        network: the float network.
        traced: the one that the plan is of, which has the same nodes, by name.
        plan: of all layers.
        group: the layers.
    """
    here = {node.name: node for node in network.graph.nodes}
    nodes = {name: node for name, node, _ in layers(traced)}
    found = []
    for name in group.layers:
        layer, node = plan.layers[name], nodes[name]
        if layer.kind not in (INTEGER, FAKE):
            continue
        fresh = zip(tensor_inputs(node), layer.inputs, strict=False)
        found += [RoundedValue(here[source.name], grid) for source, grid in fresh if grid is not None]
        assert layer.output is not None
        found.append(RoundedValue(here[_last(name, plan, nodes, group).name], layer.output))
    return found


def _last(name: str, plan: ModelPlan, nodes: Mapping[str, fx.Node], group: Group) -> fx.Node:
    """The node of a layer, or of the last activation that it computes."""
    taken = [
        nodes[other]
        for other in group.layers
        if plan.layers[other].kind == IDENTITY
        and source_layer(tensor_inputs(nodes[other])[0], plan.layers) == name
    ]
    return taken[-1] if taken else nodes[name]
