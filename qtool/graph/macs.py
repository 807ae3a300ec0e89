"""How many multiplications with an addition each layer does for one input of the batch.

Counted are the layers whose work grows with a product of sizes: convolutions, linear layers,
matrix products, and the opaque modules made of these. All others (activations, normalization,
element-wise arithmetic, pooling) count as none, as is usual in the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from qtool.graph.control import begin_steps, end_steps
from qtool.graph.trace import layers, tensor_inputs


@dataclass(frozen=True)
class LayerMacs:
    """The work of one layer.

    Args:
        count: multiply-accumulates for one input; 0 when there is no formula.
        known: whether there is a formula; a layer with weights of an unknown class has none.
    """

    count: float
    known: bool = True


def count_macs(traced: fx.GraphModule) -> dict[str, LayerMacs]:
    """The multiply-accumulates of every layer that does any, by name, for one input of the batch.

    A layer in a loop counts for each step of the example; one in a branch counts as if it were taken.
    """
    batch = _batch_size(traced)
    rounds = _rounds(traced)
    found = {}
    for name, node, outer in layers(traced):
        module = _within(outer)
        formula = _FORMULAS.get(node.meta["op"])
        if formula is not None:
            found[name] = LayerMacs(formula(node, module) * rounds[node] / batch)
        elif _has_matrices(module):
            found[name] = LayerMacs(0.0, known=False)
    return found


def _within(module: nn.Module) -> nn.Module:
    """The operation of a module that does something more with its result, as quantized layers do."""
    operation = getattr(module, "operation", module)
    within = operation[0] if isinstance(operation, nn.Sequential) and len(operation) else operation
    return within if isinstance(within, nn.Module) else module


def _batch_size(traced: fx.GraphModule) -> int:
    for node in traced.graph.nodes:
        value = node.meta.get("value")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dim():
            return max(1, value.shape[0])
    return 1


def _rounds(traced: fx.GraphModule) -> dict[fx.Node, int]:
    """How often each node runs on the example."""
    found, rounds = {}, 1
    for node in traced.graph.nodes:
        if node.target is begin_steps:
            sequence, axis = node.args[:2]
            rounds = sequence.meta["value"].shape[axis]
        rounds = 1 if node.target is end_steps else rounds
        found[node] = rounds
    return found


def _has_matrices(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters())


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(n.meta["value"].shape) for n in tensor_inputs(node)]


def _outputs(node: fx.Node) -> int:
    value = node.meta["value"]
    return math.prod((value if isinstance(value, Tensor) else value[0]).shape)


def _weight(node: fx.Node, module: Any) -> tuple[int, ...]:
    """Shape of the weight: of the layer's own, or of the one that a function takes second."""
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else _shapes(node)[1]


def _conv(node: fx.Node, module: Any) -> float:
    return _outputs(node) * math.prod(_weight(node, module)[1:])


def _conv_transpose(node: fx.Node, module: Any) -> float:
    return math.prod(_shapes(node)[0]) * math.prod(_weight(node, module)[1:])


def _linear(node: fx.Node, module: Any) -> float:
    return _outputs(node) * _weight(node, module)[-1]


def _matmul(node: fx.Node, _module: Any) -> float:
    shapes = _shapes(node)
    return _outputs(node) * (shapes[0][-1] if shapes else 0)


def _added_matmul(node: fx.Node, _module: Any) -> float:
    return _outputs(node) * _shapes(node)[1][-1]


def _einsum(node: fx.Node, module: Any) -> float:
    equation = getattr(getattr(module, "function", None), "equation", None) or str(node.args[0])
    sizes: dict[str, int] = {}
    for letters, shape in zip(
        re.sub(r"\s", "", equation).split("->")[0].split(","), _shapes(node), strict=True
    ):
        head, dots, tail = letters.partition("...")
        sizes.update(zip(head, shape, strict=False))
        sizes.update(zip(reversed(tail), reversed(shape), strict=False))
        if dots:
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape[len(head) : len(shape) - len(tail)]))
    return math.prod(sizes.values())


def _bilinear(node: fx.Node, module: Any) -> float:
    return float(_outputs(node) * module.in1_features * (module.in2_features + 1))


def _multihead_attention(_node: fx.Node, module: Any) -> float:
    shapes = _shapes(_node)
    query, key = (shapes * 3)[:2]
    axis = 1 if module.batch_first else 0
    queries, keys = math.prod(query[:-1]), math.prod(key[:-1])
    width = module.embed_dim
    projections = queries * width * width * 2 + keys * width * (module.kdim + module.vdim)
    return float(projections + 2 * queries * key[axis] * width)


def _recurrent(node: fx.Node, module: Any) -> float:
    steps = math.prod(_shapes(node)[0][:-1])
    return float(steps * sum(p.numel() for p in module.parameters() if p.dim() == 2))


_FORMULAS: dict[str, Callable[[fx.Node, Any], float]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "addmm": _added_matmul,
    "baddbmm": _added_matmul,
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
    "deform_conv2d": _conv,
    "bilinear": _bilinear,
    "multihead_attention": _multihead_attention,
    **dict.fromkeys(("lstm", "gru", "rnn"), _recurrent),
}
