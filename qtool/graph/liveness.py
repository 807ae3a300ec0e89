"""How much memory the tensors of a network need at once."""

from __future__ import annotations

from torch import Tensor, fx


def most_live_bytes(traced: fx.GraphModule) -> int:
    """Bytes of all tensors that are held at the most demanding moment, with as many images as the example.

    A tensor is held from the node that computes it to the last that reads it; an activation function that
    writes over its input needs no memory of its own. Parameters, and what a node needs while it computes,
    are left out.

    Args:
        traced: from graph.trace, with the value of each node on the example in its meta data.
    """
    owner: dict[fx.Node, fx.Node] = {}
    last_reader: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        owner[node] = owner[node.all_input_nodes[0]] if _writes_over(traced, node) else node
        last_reader.update((owner[source], node) for source in node.all_input_nodes)
    live = most = 0
    for node in traced.graph.nodes:
        if owner[node] is node:
            live += _bytes(node)
        most = max(most, live)
        live -= sum(
            _bytes(source)
            for source in {owner[n] for n in node.all_input_nodes}
            if last_reader[source] is node
        )
    return most


def _writes_over(traced: fx.GraphModule, node: fx.Node) -> bool:
    return (
        node.op == "call_module" and getattr(traced.get_submodule(str(node.target)), "inplace", False) is True
    )


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("value")
    if not isinstance(value, Tensor) or node.op in ("get_attr", "output"):
        return 0
    return value.numel() * value.element_size()
