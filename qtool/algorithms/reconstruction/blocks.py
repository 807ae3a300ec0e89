"""The blocks of a network: parts with one entry and one exit whose layers are learned together.

A value is a cut when everything behind it depends on what is in front of it through this value alone.
What lies between two cuts and has branches is a block: a residual block, half of a transformer's layer.
Chains are joined where they are known to work together: the layers around a depthwise convolution, and the
squeeze in front of branches that are concatenated. Every other layer is a block of its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import fx

from qtool.graph import ops
from qtool.graph.trace import tensor_inputs


@dataclass(frozen=True)
class Block:
    """Part of a graph.

    Args:
        entry: the node whose value the block reads; not part of it.
        nodes: in order; the last one gives what leaves the block.
        layers: the names of its layers that are to be learned.
    """

    entry: fx.Node
    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]

    @property
    def exit(self) -> fx.Node:
        """The node whose value leaves the block."""
        return self.nodes[-1]

    @property
    def work(self) -> float:
        """Multiply-accumulates of its layers for one image, about."""
        return sum(_macs(node) for node in self.nodes if node.meta.get("layer") in self.layers)


def find_blocks(
    graph: fx.Graph, layers: Collection[str], max_layers: int = 8, unit: str = "block"
) -> list[Block]:
    """The blocks of a network that hold layers to be learned, in the order of execution.

    Args:
        graph: of a network whose batch norms are folded.
        layers: the names of the layers to be learned.
        max_layers: blocks with more of these are taken apart into single layers.
        unit: "block", or "layer" for single layers only.
    """
    found: list[Block] = []
    for part in _joined(_between_cuts(graph, layers)):
        if (
            unit == "block"
            and len(part.layers) <= max_layers
            and ops.is_float_tensor(part.entry.meta.get("value"))
        ):
            found.append(part)
        else:
            found += [_alone(node) for node in part.nodes if node.meta.get("layer") in layers]
    return [block for block in found if block.layers]


def _between_cuts(graph: fx.Graph, layers: Collection[str]) -> list[Block]:
    """The graph divided at its cuts; parts without layers to be learned are among them."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in graph.nodes}
    parts: list[Block] = []
    nodes: list[fx.Node] = []
    entry: fx.Node | None = None
    alive: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "get_attr":
            continue  # the same for every image
        nodes.append(node)
        alive = {other for other in (*alive, node) if last_use[other] > place[node]}
        if alive == {node}:
            if entry is not None:
                parts.append(_part(entry, nodes, layers))
            entry, nodes = node, []
    return parts


def _part(entry: fx.Node, nodes: list[fx.Node], layers: Collection[str]) -> Block:
    named = (node.meta.get("layer") for node in nodes)
    return Block(entry, tuple(nodes), tuple(str(name) for name in named if name in layers))


def _alone(node: fx.Node) -> Block:
    return Block(tensor_inputs(node)[0], (node,), (node.meta["layer"],))


def _joined(parts: list[Block]) -> list[Block]:
    """Chains that work together made one; activations between them come along."""
    found: list[Block] = []
    waiting: list[Block] = []  # parts without layers behind the last one that has some
    for part in parts:
        if not part.layers:
            waiting.append(part)
            continue
        if found and _belong(found[-1], part) and all(_keeps_shape(between) for between in waiting):
            between = tuple(node for other in waiting for node in other.nodes)
            before = found.pop()
            part = replace(
                before, nodes=before.nodes + between + part.nodes, layers=before.layers + part.layers
            )
        found.append(part)
        waiting = []
    return found


def _belong(before: Block, after: Block) -> bool:
    """Whether neighbours make an inverted residual, a separable convolution, or a fire module."""
    if len(after.layers) > 1:
        return len(before.layers) == 1 and _is_pointwise(before) and _has_cat(after)
    if _is_depthwise(after):
        return len(before.layers) == 1 and _is_pointwise(before)
    return _is_pointwise(after) and len(before.layers) <= 2 and _is_depthwise(before)


def _is_pointwise(block: Block) -> bool:
    """Whether its last layer is a convolution of single pixels."""
    weight = _last_weight(block)
    return weight is not None and len(weight) > 2 and math.prod(weight[2:]) == 1


def _is_depthwise(block: Block) -> bool:
    """Whether its last layer is a convolution of single channels."""
    weight = _last_weight(block)
    return weight is not None and len(weight) > 2 and weight[1] == 1 and math.prod(weight[2:]) > 1


def _last_weight(block: Block) -> tuple[int, ...] | None:
    nodes = [node for node in block.nodes if node.meta.get("layer") == block.layers[-1]]
    return _weight_shape(nodes[0])


def _has_cat(block: Block) -> bool:
    return any(node.meta["op"] == "cat" for node in block.nodes)


def _keeps_shape(block: Block) -> bool:
    shapes = {
        tuple(node.meta["value"].shape) for node in block.nodes if ops.is_float_tensor(node.meta["value"])
    }
    return shapes == {tuple(block.entry.meta["value"].shape)}


def _weight_shape(node: fx.Node) -> tuple[int, ...] | None:
    module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


def _macs(node: fx.Node) -> float:
    shape = _weight_shape(node)
    assert shape is not None
    _, *extent = node.meta["value"].shape
    return float(math.prod(extent) * math.prod(shape[1:]))
