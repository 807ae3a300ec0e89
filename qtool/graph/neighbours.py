"""What follows what: the net-aware ranges of outputs, and the fusion of ReLU.

An output that goes into a ReLU and nowhere else need not represent negative values; one that goes
into tanh need not represent more than [-4, 4]. The statistics are edited to say so before grids are
chosen, and a ReLU that follows a quantized layer is computed by that layer's clamp.
"""

import math
from dataclasses import replace

from torch import Tensor, fx

from qtool.graph import ops
from qtool.graph.capped import limit_of
from qtool.graph.trace import layers, tensor_inputs
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats

# What stays distinguishable behind the operation: the interval of its input that matters.
INTERVALS = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "tanh": (-4.0, 4.0),
    "sigmoid": (-6.0, 6.0),
}
# Operations that the producing layer's clamp computes.
FUSIBLE = ("relu", "relu6")


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that use the values of a node's result, seen through dropout and the like.

    Reading its shape is not using its values; being the network's output is.
    """
    found = []
    for user in node.users:
        if user.op == "output":
            found.append(user)
        elif not reads_values(user):
            continue
        elif user.meta["op"] in ops.KEEPS_GRID:
            found.extend(readers(user))
        else:
            found.append(user)
    return found


def source_of(node: fx.Node, through: frozenset[str] = ops.KEEPS_GRID) -> fx.Node:
    """The node whose value a node hands on, seen through dropout and the like; the node itself for others.

    Args:
        node: where to start, in a network or a quantized one.
        through: the operations that are seen through, where they are no layers.
    """
    while "layer" not in node.meta and node.meta.get("op") in through and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node


def reads_values(node: fx.Node) -> bool:
    """Whether a node uses the numbers of its inputs, not only their shape."""
    value = node.meta.get("value")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, Tensor) for v in values) or node.meta["op"] not in ops.READS_SHAPE


def following_op(node: fx.Node) -> tuple[str, fx.Node] | None:
    """The operation that alone reads a node's result, and its node; None when there are several.

    A split whose parts all go into ReLU counts as ReLU, and so on; parts that go into a mix of
    sigmoid and tanh count as sigmoid, the wider of the two.
    """
    following = readers(node)
    if len(following) != 1:
        return None
    (reader,) = following
    op: str = reader.meta["op"]
    if op not in ops.SPLITS:
        return op, reader
    parts: list[fx.Node] = []
    for user in reader.users:
        parts += readers(user) if user.meta["op"] == "getitem" else [user]
    kinds = {part.meta["op"] for part in parts}
    if kinds in ({"relu"}, {"tanh"}):
        return kinds.pop(), reader
    if kinds and kinds <= {"sigmoid", "tanh"}:
        return "sigmoid", reader
    return op, reader


def edit_stats(traced: fx.GraphModule, stats: ModelStats, quantized: set[str]) -> ModelStats:
    """Clamp the output records of layers to the interval that their only reader distinguishes.

    Args:
        traced: the network, batch norms folded.
        stats: of the same network.
        quantized: names of the layers whose output is quantized; others are left alone.

    Returns:
        New statistics. min, max, avg_min and avg_max are clamped; mean, std and b stay those of
        the unclamped tensor, as ACIQ's half range needs them. The reader's input record follows.

    Raises:
        StatsError: if a layer that needs the edit has no record.
    """
    edited = dict(stats.layers)
    for name, node, _ in layers(traced):
        following = following_op(node) if name in quantized else None
        if following is None or following[0] not in INTERVALS:
            continue
        op, reader = following
        record = _limited(traced, stats, name, op, reader)
        edited[name] = replace(edited[name], output=record)
        reader_name = reader.meta.get("layer")
        if reader_name in edited:
            inputs = {**edited[reader_name].inputs, 0: record}
            edited[reader_name] = LayerStats(inputs, edited[reader_name].output)
    return ModelStats(edited, stats.source)


def _limited(
    traced: fx.GraphModule, stats: ModelStats, name: str, op: str, reader: fx.Node
) -> ActivationStats:
    """The record of a layer's output, limited as its reader does."""
    record = stats.output(name)
    limit = limit_of(traced.get_submodule(reader.meta["layer"])) if "layer" in reader.meta else None
    if limit is None:
        return record.clamped(*INTERVALS[op])
    # What a limit for each channel leaves cannot be told from the extremes of all channels.
    found = stats.output(reader.meta["layer"])
    return replace(found, mean=record.mean, std=record.std, b=record.b)


def fused_activations(traced: fx.GraphModule, quantized: set[str]) -> dict[str, tuple[str, str]]:
    """Which layers take over the ReLU or ReLU6 that alone reads them.

    Returns:
        Name of the layer -> (name of the activation layer, its operation).
    """
    fused = {}
    for name, node, _ in layers(traced):
        following = following_op(node) if name in quantized else None
        if following is not None and following[0] in FUSIBLE and "layer" in following[1].meta:
            fused[name] = (following[1].meta["layer"], following[0])
    return fused
