"""A float network and its quantized form walked side by side, layer by layer, on the same images.

At each quantized layer with weights both networks stand in front of it: what it reads in float and what
it reads behind a quantized prefix are there for all images. Its integers or its bias may be changed
before the quantized network goes on, so that later layers see the change. The whole costs one run of
both networks, whatever is done at the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from qtool.graph.edit import with_parameters
from qtool.graph.fold import Folded
from qtool.graph.trace import copy_graph, layers, tensor_inputs
from qtool.graph.walk import Walk
from qtool.numerics.affine import dequantize_centered
from qtool.numerics.spec import QParams
from qtool.quantizers.adjust import adjusted, changed_modules
from qtool.quantizers.plan import IDENTITY, INTEGER, WEIGHTED, WEIGHTS_ONLY, LayerPlan, ModelPlan
from qtool.quantizers.plan.derived import grids_read, value_grids, with_accumulator
from qtool.quantizers.prepare import build, build_layer
from qtool.quantizers.weights import fake_quantize_bias

# Layers whose weights are on a grid.
HAS_INTEGERS = (INTEGER, WEIGHTS_ONLY)


class Moment:
    """Both networks in front of one layer.

    Attributes:
        name: of the layer.
        module: the layer of the float reference.
        plan: what became of it.
    """

    def __init__(self, lockstep: Lockstep, name: str, module: nn.Module) -> None:
        self._lockstep = lockstep
        self.name = name
        self.module = module
        self.plan: LayerPlan = lockstep.plan.layers[name]

    @property
    def images(self) -> int:
        """How many images there are, in all batches."""
        return self._lockstep.images

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the layer reads in float and behind the quantized prefix, batch by batch.

        The same as float_inputs and quant_inputs, of which only one batch is in memory.
        """
        lockstep = self._lockstep
        return zip(lockstep.float_inputs(self.name), lockstep.quant_inputs(self.name), strict=True)

    @cached_property
    def float_inputs(self) -> list[Tensor]:
        """What the layer reads in the float network, for each batch; not to be written to."""
        return list(self._lockstep.float_inputs(self.name))

    @cached_property
    def quant_inputs(self) -> list[Tensor]:
        """The float values of what it reads in the quantized network, for each batch."""
        return list(self._lockstep.quant_inputs(self.name))


class Lockstep:
    """Two networks and the batches that go through both.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the one that the plan quantizes; other weights than those of the reference are allowed.
        plan: static, of folded.
        batches: inputs of the networks, which stay in memory with all values that are still needed.

    Attributes:
        folded, plan: with all changes so far; those that were given stay as they were.
        batches: as given.
        images: how many there are, in all batches.
    """

    def __init__(
        self, reference: fx.GraphModule, folded: Folded, plan: ModelPlan, batches: Sequence[Tensor]
    ) -> None:
        self.reference = reference
        self.folded = Folded(copy_graph(folded.traced), folded.pairs)
        self.plan = plan
        self.network = build(self.folded, plan).network
        self.batches = batches
        self.images = sum(len(batch) for batch in batches)
        self.float_walk = Walk(reference, batches)
        self.quant_walk = Walk(self.network, batches)
        self._grids = value_grids(self.folded.traced, plan.layers)
        self._float_nodes = {name: node for name, node, _ in layers(reference)}
        quantized = [node for node in self.network.graph.nodes if "layer" in node.meta]
        self._quant_nodes: dict[str, fx.Node] = {node.meta["layer"]: node for node in quantized}
        self._own_nodes = {name: node for name, node, _ in layers(self.folded.traced)}
        self._float_by_name = {node.name: node for node in reference.graph.nodes}
        self._quant_by_name = {node.name: node for node in self.network.graph.nodes}

    def node(self, name: str) -> fx.Node:
        """A layer's node in the float reference."""
        return self._float_nodes[name]

    def quant_node(self, name: str) -> fx.Node:
        """A layer's node in the quantized network."""
        return self._quant_nodes[name]

    def input_grid(self, name: str) -> QParams | None:
        """The grid on which a layer reads its input; None for float."""
        plan = self.plan.layers[name]
        return grids_read(self._own_nodes[name], plan, self._grids)[0] if plan.kind == INTEGER else None

    def float_inputs(self, name: str) -> Iterator[Tensor]:
        """What a layer reads in the float network, which stands in front of it, batch by batch."""
        for args, _ in self.float_walk.arguments(self.node(name)):
            yield args[0]

    def quant_inputs(self, name: str) -> Iterator[Tensor]:
        """The float values of what it reads in the quantized network, batch by batch."""
        grid = self.input_grid(name)
        for args, _ in self.quant_walk.arguments(self.quant_node(name)):
            yield args[0] if grid is None else dequantize_centered(args[0], grid)

    def quant_operand(self, name: str, index: int) -> Iterator[Tensor]:
        """The float values of what a layer further on will read as one of its inputs, batch by batch.

        Args:
            name: of the layer; it may be any.
            index: of the tensor among those that it reads; no layer that may still change is in front of it.
        """
        plan = self.plan.layers[name]
        grids = grids_read(self._own_nodes[name], plan, self._grids)
        grid = grids[index] if plan.kind == INTEGER else None  # all others read floats
        for value in self.quant_walk.ahead(tensor_inputs(self.quant_node(name))[index]):
            yield value if grid is None else dequantize_centered(value, grid)

    def moments(self, quantized: bool = True) -> Iterator[Moment]:
        """Every layer with integer weights, in the order of execution, both networks in front of it.

        Args:
            quantized: whether the quantized network runs; without it there are no quant_inputs.
        """
        modules = {name: module for name, _, module in layers(self.reference)}
        for name in integer_layers(self.reference, self.plan):
            self.float_walk.before(self.node(name))
            if quantized:
                self.quant_walk.before(self.quant_node(name))
            yield Moment(self, name, modules[name])

    def float_values(self, node: fx.Node) -> list[Tensor]:
        """What a node of folded.traced gives in the float network, for each batch; it runs up to there."""
        here = self._float_by_name[node.name]
        self.float_walk.past(here)
        return self.float_walk.values(here)

    def quant_values(self, node: fx.Node) -> tuple[list[Tensor], QParams | None]:
        """What a node of folded.traced gives in the quantized network, which runs up to there.

        Returns:
            For each batch its values, and the grid of which they are the centered integers, None for floats.
        """
        grid = self._grids[node]
        while "layer" in node.meta and self.plan.layers[node.meta["layer"]].kind == IDENTITY:
            node = tensor_inputs(node)[0]  # the layer in front of it gives its values
        here = self._quant_by_name[node.name]
        self.quant_walk.past(here)
        return self.quant_walk.values(here), grid

    def move_outputs(self, outputs: Mapping[str, QParams]) -> None:
        """Give layers other output grids, and what reads them what follows; none of these may have run yet.

        Args:
            outputs: by layer, of the bits and the mode that they have.

        Raises:
            ValueError: as adjusted does.
        """
        before = self.plan
        self.plan = adjusted(self.folded.traced, before, outputs=outputs)
        self._grids = value_grids(self.folded.traced, self.plan.layers)
        new = changed_modules(self.network, self.folded.traced, before, self.plan)
        for name, module in new.items():
            self.network.set_submodule(name, module.eval().requires_grad_(False))

    def change(
        self,
        name: str,
        weight_q: Tensor | None = None,
        bias: Tensor | None = None,
        weight: QParams | None = None,
    ) -> None:
        """Give a layer other integers, bias or grid; the quantized network must not have run it yet.

        Args:
            name: of the layer.
            weight_q: integers on the grid of its weight, output channels first, in the dtype of those it has.
            bias: (C,), float.
            weight: the grid of its weight, of the same bits and mode; the integers stay.
        """
        module = self.folded.traced.get_submodule(name)
        if bias is not None:
            module = with_parameters(module, bias=bias)
            self.folded.traced.set_submodule(name, module)
        plan = self.plan.layers[name]
        if weight_q is not None:
            plan = replace(plan, weight_q=weight_q)
        if weight is not None:
            plan = replace(plan, weight=weight)
        grid = self.input_grid(name)
        if grid is not None:
            plan = with_accumulator(plan, grid, getattr(module, "bias", None))
        elif bias is not None:
            plan = replace(plan, bias=fake_quantize_bias(bias, plan.accum_bits))
        self.plan = replace(self.plan, layers={**self.plan.layers, name: plan})
        node = self._own_nodes[name]
        read = grids_read(node, plan, self._grids)
        self.network.set_submodule(name, build_layer(module, plan, read, node).eval().requires_grad_(False))


def integer_layers(reference: fx.GraphModule, plan: ModelPlan) -> list[str]:
    """The names of the convolutions and linear layers with integer weights, in the order of execution."""
    found = ((name, node.meta["op"]) for name, node, _ in layers(reference))
    return [name for name, op in found if plan.layers[name].kind in HAS_INTEGERS and op in WEIGHTED]


def float_bias(module: nn.Module, channels: int) -> Tensor:
    """A layer's bias, or zeros where it has none; (C,)."""
    bias = getattr(module, "bias", None)
    return torch.zeros(channels) if bias is None else bias.detach()
