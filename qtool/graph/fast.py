"""The same network in the form in which it runs fastest, for passes that only look at it.

Batch norms are folded, convolutions compute in channels-last order, and an activation function that alone
reads a fresh tensor writes over it. The tensors between the layers are those of the original up to the
rounding of float32, but the output of a layer that has taken in its batch norm is that of the
batch norm, and what was in front of it is never computed.
"""

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn

from qtool.graph import ops
from qtool.graph.capped import CappedReLU6, limit_of
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import copy_graph, layers

# Layers whose result is memory of their own, and the functions that may write over it.
FRESH = frozenset({"conv", "conv_transpose", "linear", "batch_norm", "add", "mul", "cat", "layer_norm"})
IN_PLACE: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


@dataclass(frozen=True)
class Fast:
    """A network to run, and the names that its tensors have in the original.

    Args:
        traced: the network; its weights are its own where their order differs.
        folded: name of each folded batch norm -> name of the layer that took it in.
    """

    traced: fx.GraphModule
    folded: dict[str, str]


def fast(traced: fx.GraphModule) -> Fast:
    """The fast form of a network that trace has given, which stays as it was."""
    folded = fold_batch_norms(traced)
    quick = channels_last(folded.traced)
    for name, node, module in list(layers(quick)):
        if _may_write_over_its_input(node):
            quick.set_submodule(name, _in_place(node.meta["op"], module))
    return Fast(quick, folded.pairs)


def channels_last(traced: fx.GraphModule) -> fx.GraphModule:
    """The network with its convolutions in channels-last order; the given one stays as it was."""
    quick = copy_graph(traced)
    views = [node for node in quick.graph.nodes if node.op == "call_method" and node.target == "view"]
    for node in views:
        node.target = "reshape"  # a view of another memory order may not exist
    if views:
        quick.recompile()
    for name, _, module in list(layers(quick)):
        if ops.module_op(module) == "conv" and isinstance(module, nn.Conv2d):
            quick.set_submodule(name, _channels_last(module))
    return quick


def _in_place(op: str, module: nn.Module) -> nn.Module:
    limit = limit_of(module)
    return IN_PLACE[op](inplace=True) if limit is None else CappedReLU6(limit, inplace=True)


def _channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy whose weight, and so its output, is in channels-last order."""
    copied = copy.copy(conv)
    copied._parameters = dict(conv._parameters)
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    copied.weight = nn.Parameter(weight, requires_grad=False)
    return copied


def _may_write_over_its_input(node: fx.Node) -> bool:
    if node.meta["op"] not in IN_PLACE or len(node.args) != 1 or node.kwargs:
        return False
    (source,) = node.args
    return (
        isinstance(source, fx.Node)
        and "layer" in source.meta
        and source.meta["op"] in FRESH
        and len(source.users) == 1
    )
