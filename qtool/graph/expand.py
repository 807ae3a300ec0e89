"""Functions that compute several things, as the layers that they consist of.

An expansion is a function of the same arguments, written with what has a name of its own; it is
called with traced values, whose shapes on the example are known (`attention.shape_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torchvision.models import swin_transformer

from qtool.graph import attention
from qtool.graph.parameters import add_constant


class Einsum:
    """torch.einsum of two operands; it is a product, so that integers go through it."""

    __name__ = "einsum"

    def __init__(self, equation: str) -> None:
        self.equation = equation

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((a, b)):
            result: Tensor = torch.overrides.handle_torch_function(self, (a, b), a, b)
            return result
        return torch.einsum(self.equation, a, b)


def _einsum(equation: str, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str):
        return None
    return Einsum(equation)(*operands)


def _add_product(x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """addmm and baddbmm."""
    product = torch.matmul(a, b)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else (x if beta == 1 else x * beta) + product


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """F.linear whose weight is computed from the input; parameters are for parameters.make_layers."""
    if weight.node.op == "get_attr":
        return None
    product = torch.matmul(x, weight.transpose(-2, -1))
    return product if bias is None else product + bias


EXPANSIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.ops.aten.linear.default: _linear,
    F.scaled_dot_product_attention: attention.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default: attention.scaled_dot_product_attention,
    swin_transformer.shifted_window_attention: attention.shifted_window_attention,
    torch.einsum: _einsum,
    torch.ops.aten.einsum.default: _einsum,
    torch.addmm: _add_product,
    torch.baddbmm: _add_product,
    torch.ops.aten.addmm.default: _add_product,
    torch.ops.aten.baddbmm.default: _add_product,
}


def expand_calls(traced: fx.GraphModule) -> bool:
    """Replace the calls that EXPANSIONS knows, in place; whether there were any.

    Needs meta["value"] of every node, and gives none to the new ones.
    """
    expanded = False
    for node in list(traced.graph.nodes):
        expansion = EXPANSIONS.get(node.target) if node.op == "call_function" else None
        if expansion is None:
            continue
        tracer = _Tracer(traced, node)
        proxy: Any = tracer.proxy
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), proxy)
        with traced.graph.inserting_before(node):
            result = expansion(*args, **kwargs)
        if result is None:
            continue
        node.replace_all_uses_with(result.node)
        traced.graph.erase_node(node)
        expanded = True
    traced.recompile()
    return expanded


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Appends to a graph on behalf of a node that is to be replaced."""

    def __init__(self, traced: fx.GraphModule, node: fx.Node) -> None:
        super().__init__(traced.graph)
        self.traced, self.replaced = traced, node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return add_constant(self.traced, self.replaced, a)
        return super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["path"] = self.replaced.meta.get("path", "")
        if "guard" in self.replaced.meta:
            proxy.node.meta["guard"] = self.replaced.meta["guard"]
        return proxy
