"""Which layers of a quantized network change together: the units of sensitivity and of tuning.

A group is the smallest set of layers whose return to float leaves no operation with mixed inputs: a sum
does not read one branch on a grid and the other in float. So the layers whose outputs meet in a sum, a
product, a concatenation or a matrix product on integers are one group, closed over all such operations;
an activation goes with the layer that computes it, and layers with one weight between them go together.

What reads a group's tensors keeps its own grids: it puts what arrives in float on a grid by its own records.

Reference:
    The groups of NNCF's accuracy control, with quantizers that belong to the layer that gives a tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from qtool.graph import ops
from qtool.graph.flow import shared_parameters
from qtool.graph.trace import layers, tensor_inputs
from qtool.quantizers.plan import (
    DYNAMIC,
    DYNAMIC_FAKE,
    EMBEDDING,
    FAKE,
    IDENTITY,
    INTEGER,
    WEIGHTED,
    WEIGHTS_ONLY,
    LayerPlan,
    ModelPlan,
)

# What gives a tensor on a grid, and what has any quantizer at all.
GIVES_GRID = frozenset({INTEGER, FAKE, DYNAMIC, DYNAMIC_FAKE, EMBEDDING})
QUANTIZED = GIVES_GRID | {WEIGHTS_ONLY}
# What computes on the integers of its inputs.
ON_INTEGERS = frozenset({INTEGER, DYNAMIC})

Plans = Mapping[str, LayerPlan]
Pairs = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Group:
    """Layers that are quantized, or left in float, together.

    Args:
        name: the first of them that has weights, else the first.
        layers: their names in the order of execution, activations that they compute included.
    """

    name: str
    layers: tuple[str, ...]


def quantizer_groups(traced: fx.GraphModule, plan: ModelPlan) -> tuple[Group, ...]:
    """The groups of a planned network, in the order of execution.

    Args:
        traced: the float network, batch norms folded.
        plan: of the same network; layers that it leaves in float are in no group.
    """
    return _groups(traced, plan, _carried, _of_one_weight, _meeting)


def layer_groups(traced: fx.GraphModule, plan: ModelPlan) -> tuple[Group, ...]:
    """As quantizer_groups, without those that only an operation on several tensors joins.

    Where such an operation then reads one tensor in float, it puts it on a grid of its own.
    """
    return _groups(traced, plan, _carried, _of_one_weight)


def _groups(
    traced: fx.GraphModule, plan: ModelPlan, *rules: Callable[[fx.GraphModule, Plans], Pairs]
) -> tuple[Group, ...]:
    names = [name for name, _, _ in layers(traced) if plan.layers[name].kind in QUANTIZED]
    together = {name: {name} for name in names}
    for rule in rules:
        for one, other in rule(traced, plan.layers):
            joined = together.setdefault(one, {one}) | together.setdefault(other, {other})
            together.update(dict.fromkeys(joined, joined))
    place = {name: number for number, (name, _, _) in enumerate(layers(traced))}
    found = {min(joined, key=place.__getitem__): joined for joined in together.values()}
    ordered = [sorted(found[first], key=place.__getitem__) for first in sorted(found, key=place.__getitem__)]
    return tuple(Group(_name(members, plan.layers), tuple(members)) for members in ordered)


def _name(members: list[str], plans: Plans) -> str:
    with_weights = [name for name in members if plans[name].op in WEIGHTED]
    return (with_weights or members)[0]


def _carried(traced: fx.GraphModule, plans: Plans) -> Pairs:
    """Layers and the activations that they compute."""
    for name, node, _ in layers(traced):
        if plans[name].kind != IDENTITY:
            continue
        source = source_layer(tensor_inputs(node)[0], plans)
        if source is not None and _activation(plans[source]) == plans[name].op:
            yield source, name


def _activation(plan: LayerPlan) -> str | None:
    return plan.activation if plan.dynamic is None else plan.dynamic.activation


def _of_one_weight(traced: fx.GraphModule, plans: Plans) -> Pairs:
    """Layers that share a weight which is on a grid."""
    for name, other in shared_parameters(traced).items():
        if plans[name].weight_q is not None and plans[other].weight_q is not None:
            yield name, other


def _meeting(traced: fx.GraphModule, plans: Plans) -> Pairs:
    """Layers whose outputs one operation reads on their grids."""
    for name, node, _ in layers(traced):
        plan = plans[name]
        if plan.kind not in ON_INTEGERS or plan.op in WEIGHTED:
            continue
        fresh = plan.inputs if plan.dynamic is None else plan.dynamic.inputs
        read = zip(tensor_inputs(node), fresh, strict=True)
        sources = [source_layer(tensor, plans) for tensor, own in read if own is None]
        on_grid = [source for source in sources if source is not None]
        yield from itertools.pairwise(on_grid)


def source_layer(node: fx.Node, plans: Plans) -> str | None:
    """The layer whose grid a value has, seen through dropout and the like; None for a float one."""
    while True:
        name = node.meta.get("layer")
        if name is not None and plans[name].kind != IDENTITY:
            return name if plans[name].kind in QUANTIZED else None
        sources = tensor_inputs(node)
        if not sources or (name is None and node.meta["op"] not in ops.KEEPS_GRID):
            return None
        node = sources[0]
