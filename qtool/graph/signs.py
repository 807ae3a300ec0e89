"""Which values of a network can never be negative, whatever the images: decided from its operations."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, fx

from qtool.graph import ops
from qtool.graph.trace import tensor_inputs

# Never negative, whatever they read.
RECTIFYING = frozenset(
    {
        *("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softmax2d", "softplus"),
        *("abs", "exp", "square", "sqrt"),
    }
)
# Never negative if nothing that they read is: averages, maxima, sums and products.
PRESERVING = frozenset(
    {
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("mean", "sum", "amax", "amin", "cat", "stack", "matmul", "repeat_interleave"),
    }
)
# Likewise, if no number among their arguments is negative.
COMBINING = frozenset({"add", "mul", "clamp", "clamp_min", "pad"})


def never_negative(traced: fx.GraphModule, rectified: Set[str], left_out: Set[str]) -> frozenset[fx.Node]:
    """The nodes whose values can never be negative.

    Args:
        traced: the network.
        rectified: layers whose output goes through a ReLU of their own, or one that they take over.
        left_out: layers that are replaced by nothing, whatever they compute.
    """
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        name = node.meta.get("layer")
        if name in left_out:
            known = all(source in found for source in tensor_inputs(node))
        else:
            known = name in rectified or _is_never_negative(traced, node, found)
        if known:
            found.add(node)
    return frozenset(found)


def _is_never_negative(traced: fx.GraphModule, node: fx.Node, found: Set[fx.Node]) -> bool:
    op = node.meta["op"]
    if node.op == "get_attr":
        return _is_constant_never_negative(traced, str(node.target))
    if op in RECTIFYING:
        return True
    if op in ("clamp", "clamp_min") and _lower_limit(node) is not None:
        return True
    sources = tensor_inputs(node)
    if not sources or not all(source in found for source in sources):
        return False
    if op in ops.KEEPS_GRID or op in ops.MOVES or op in PRESERVING:
        return True
    return op in COMBINING and all(number >= 0 for number in ops.numbers_in((node.args, node.kwargs)))


def _is_constant_never_negative(traced: fx.GraphModule, path: str) -> bool:
    value = ops.attribute(traced, path)
    return isinstance(value, Tensor) and ops.is_float_tensor(value) and bool((value >= 0).all())


def _lower_limit(node: fx.Node) -> float | None:
    """The lower limit of a clamp that is a number of at least 0."""
    limit = node.kwargs.get("min", node.args[1] if len(node.args) > 1 else None)
    return float(limit) if isinstance(limit, (int, float)) and limit >= 0 else None
