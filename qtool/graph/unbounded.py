"""Which values of a network are masks: -inf, or as good as that, in front of a softmax.

No grid holds both -inf and the scores beside it, so a mask, and what it is put into, stay in float:
nothing is measured there, and no range is chosen. What reads them (the softmax) gives finite values
again. Marked is what the network's code says, such as `masked_fill(mask, -inf)`, whether or not the
example has anything to mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from qtool.graph import ops

# A softmax gives 0 for a score that is so far below the others; masks of -1e4 and -1e9 are common.
FAR = -1e4
# Operations that put a number of their arguments into a tensor.
FILLS = frozenset(
    {
        *("masked_fill", "where", "full", "full_like", "new_full", "fill", "index_fill", "pad"),
        *("scalar_tensor", "mul"),
    }
)
# Operations that hand what is far below on to their result, apart from those that move values.
SPREADS = frozenset(
    {
        *("add", "sub", "mul", "div", "neg", "masked_fill", "where", "triu", "tril", "cat", "stack"),
        *("max", "maximum", "clamp", "clamp_min", "pad", "index_fill"),
    }
)


def mark_unbounded(traced: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note `meta["unbounded"]` on every node whose values may be those of a mask.

    Args:
        traced: its nodes have meta["op"].
        inputs: the value of each placeholder, in order.
    """
    values = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            node.meta["unbounded"] = _is_mask(next(values), -torch.inf)
        elif node.op == "get_attr":
            value = ops.attribute(traced, str(node.target))
            # A weight is never a mask: if it holds -inf, the checkpoint is broken.
            node.meta["unbounded"] = not isinstance(value, nn.Parameter) and _is_mask(value, FAR)
        else:
            node.meta["unbounded"] = _fills(node) or _spreads(node)


def is_unbounded(node: fx.Node) -> bool:
    """Whether a node of a traced network was marked."""
    return bool(node.meta.get("unbounded"))


def _fills(node: fx.Node) -> bool:
    return node.meta["op"] in FILLS and any(
        number <= FAR for number in ops.numbers_in((node.args, node.kwargs))
    )


def _spreads(node: fx.Node) -> bool:
    op = node.meta["op"]
    spreads = op in SPREADS or op in ops.MOVES or op in ops.KEEPS_GRID
    return spreads and any(is_unbounded(source) for source in node.all_input_nodes)


def _is_mask(value: Any, limit: float) -> bool:
    """Whether a tensor holds values at or below a limit, and otherwise only finite ones."""
    if not ops.is_float_tensor(value) or value.numel() == 0:
        return False
    return float(value.min()) <= limit and bool((value < torch.inf).all())
