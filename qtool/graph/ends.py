"""The two ends of a network: its first and last layers of some kind, and whose values they read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import fx

from qtool.graph.neighbours import reads_values
from qtool.graph.ops import MAX_POOLS
from qtool.graph.trace import layers, tensor_inputs

# What these give are values of their input, or of all their inputs, and no new ones besides a bound.
SELECTS = frozenset(
    {"relu", "relu6", "hardtanh", "clamp", "cat", "stack", "pad", "amax", "maximum", *MAX_POOLS}
)


def first_and_last(traced: fx.GraphModule, ops: Collection[str]) -> tuple[list[str], list[str]]:
    """The layers of some operations that no other such layer precedes, and those that none follows.

    A network with several inputs, or several heads, has several. What follows is told by the edges of the
    graph; reading a tensor's shape is not following it.

    Args:
        traced: the network.
        ops: the operations that count.

    Returns:
        Names of the first and of the last layers, each in the order of execution.
    """
    wanted = [(name, node) for name, node, _ in layers(traced) if node.meta["op"] in ops]
    nodes = {node for _, node in wanted}
    order = list(traced.graph.nodes)
    behind = _reached(order, nodes, lambda node: node.all_input_nodes if reads_values(node) else ())
    ahead = _reached(order[::-1], nodes, lambda node: [u for u in node.users if reads_values(u)])
    first = [name for name, node in wanted if node not in behind]
    last = [name for name, node in wanted if node not in ahead]
    return first, last


def _reached(
    order: Iterable[fx.Node],
    starts: Collection[fx.Node],
    neighbours: Callable[[fx.Node], Iterable[fx.Node]],
) -> set[fx.Node]:
    """The nodes with a start among their neighbours, or the neighbours of these, and so on."""
    found: set[fx.Node] = set()
    for node in order:
        if any(other in starts or other in found for other in neighbours(node)):
            found.add(node)
    return found


def feeding(node: fx.Node) -> list[str]:
    """The layers that make the values which a layer reads.

    Behind a layer that only selects among its values, such as a pooling by maximum, come those that feed it.

    Args:
        node: the layer, of a network whose batch norms are folded.

    Returns:
        Names, nearest first; none for what the network is given.
    """
    found: dict[str, None] = {}
    waiting = list(tensor_inputs(node))
    while waiting:
        source = waiting.pop(0)
        name = source.meta.get("layer")
        if name is not None:
            found[name] = None
        if name is None or source.meta["op"] in SELECTS:
            waiting += source.all_input_nodes if reads_values(source) else []
    return list(found)
