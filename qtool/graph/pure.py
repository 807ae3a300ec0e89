"""Graphs without operations in place: every operation gives a tensor of its own."""

from __future__ import annotations

import inspect

from torch import fx, nn

from qtool.graph import ops


def make_pure(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Replace operations in place: later readers of the overwritten tensor read the result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _take_out_of_place(node, modules) or not isinstance(node.args[0], fx.Node):
            continue
        overwritten = node.args[0]
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)


def _take_out_of_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Turn one node to its pure form; whether it had been in place."""
    if node.op == "call_module":
        # The flag itself is switched off when the layers get modules of their own.
        return getattr(modules[str(node.target)], "inplace", False) is True
    if node.op not in ("call_function", "call_method"):
        return False
    pure = ops.out_of_place(node.target)
    if pure is not None and (node.op == "call_method" or callable(pure)):
        node.target = pure
        return True
    return node.op == "call_function" and _clear_inplace_argument(node)


def _clear_inplace_argument(node: fx.Node) -> bool:
    """Set an argument `inplace` of a function to False; whether it had been True."""
    if node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    position = names.index("inplace") if "inplace" in names else len(node.args)
    if position < len(node.args) and node.args[position] is True:
        node.update_arg(position, False)
        return True
    return False


def has_effect(node: fx.Node) -> bool:
    if node.op == "call_function" and ops.function_name(node.target) == "setitem":
        return True
    if node.op == "call_method" and str(node.target).endswith("_"):
        return True
    return bool(node.is_impure())
