"""Where activations with the channels last in memory end.

Convolutions of the simulation give tensors whose channels are innermost in memory (torch.channels_last):
the same values, read in another order. What computes on each value alone does not care. All else is given
its input in the usual order: a method such as `view` refuses any other, and a sum over an image would add up
in another order, which changes the last bit of a float.
"""

from __future__ import annotations

from torch import Tensor, fx

from qtool.graph import ops
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.grids import Dequantize, Quantize
from qtool.quantizers.modules import FakeQuantize, QuantProduct
from qtool.quantizers.rescaling import QuantAdd, QuantCat
from qtool.quantizers.weighted import QuantWeighted

# Operations in float on each value alone, and those that pick some values.
EACH_ALONE = frozenset(
    {
        *("relu", "relu6", "leaky_relu", "hardtanh", "clamp", "hardswish", "hardsigmoid", "silu", "mish"),
        *("gelu", "elu", "celu", "selu", "sigmoid", "tanh", "softplus", "max_pool2d", "mul", "add"),
    }
)


def read_in_order(network: fx.GraphModule) -> None:
    """Give the values of images in the usual order in memory, in place, to whatever may depend on it."""
    in_order: dict[fx.Node, fx.Node] = {}
    for node in list(network.graph.nodes):
        if _takes_any_order(network, node):
            continue
        for source in dict.fromkeys(node.all_input_nodes):
            if not _is_image(source) or source.op in ("placeholder", "get_attr"):
                continue
            if source.meta.get("op") == "contiguous":
                continue
            if source not in in_order:
                in_order[source] = _insert(network, source)
            node.replace_input_with(source, in_order[source])


def _insert(network: fx.GraphModule, source: fx.Node) -> fx.Node:
    """A node that gives the value of another in the usual order; a copy only where it is in another."""
    with network.graph.inserting_after(source):
        node = network.graph.call_method("contiguous", (source,))
    node.meta.update(op="contiguous", value=source.meta["value"])
    return node


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return isinstance(value, Tensor) and value.dim() == 4


def _takes_any_order(network: fx.GraphModule, node: fx.Node) -> bool:
    op = node.meta.get("op")
    if op in ops.KEEPS_GRID:
        return True
    if op in ops.READS_SHAPE:
        return op not in ("stride", "is_contiguous")
    if node.op != "call_module":
        return False
    module = network.get_submodule(str(node.target))
    if isinstance(module, FakeQuantize):
        return op in EACH_ALONE and len(tensor_inputs(node)) == 1
    if isinstance(module, QuantWeighted):
        return bool(op == "conv")
    if isinstance(module, QuantProduct):
        return bool(op == "mul")
    return isinstance(module, (Quantize, Dequantize, QuantAdd, QuantCat))
