"""What is not rounded between layers that compute on integers: the network's output, sums, and max pools.

A layer in front of such a value reads its input on a grid and has integer weights, and what its accumulator
holds goes back to float without another rounding. What reads the value puts it on a grid of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from qtool.graph import ops
from qtool.graph.ends import SELECTS
from qtool.graph.fold import fold_batch_norms
from qtool.graph.neighbours import FUSIBLE, readers, source_of
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import LayerSpec
from qtool.quantizers.plan import WEIGHTED
from qtool.quantizers.plan.kinds import INTEGER_OPS, computes_only_tensors

Specs = Mapping[str, LayerSpec]
Own = Mapping[str, Mapping[str, Any]]
# Nodes that hand on the values they read, in another order at most.
MOVED = ops.KEEPS_GRID | ops.MOVES
# What of one tensor is some of its values; sums in float are looked for through them.
CHOOSES = SELECTS - {"cat", "stack", "maximum"}


def with_float_output(traced: fx.GraphModule, specs: Specs, own: Own) -> dict[str, LayerSpec]:
    """The specs with float outputs of the layers that give what the network gives.

    An activation function at the end is computed in float too.

    Args:
        traced: the network.
        specs: what is asked, by layer name.
        own: the settings of each layer's override, by layer name; one that sets the activation bits wins.
    """
    folded = fold_batch_norms(traced).traced
    ends = [n for node in folded.graph.nodes if node.op == "output" for n in node.all_input_nodes]
    found = dict(specs)
    for name in _giving(ends, frozenset(FUSIBLE), anything=True):
        _leave(found, name, own)
    return found


def with_float_sums(traced: fx.GraphModule, specs: Specs, own: Own) -> dict[str, LayerSpec]:
    """The specs with float sums: neither they nor the results of layers that they add up are rounded.

    Activations behind a sum, and whatever computes in float anyway, take it as it is; convolutions, linear
    layers and products put it on their own grids. Outputs of other operations that are added stay on theirs.

    Args:
        traced, specs, own: as for with_float_output.
    """
    folded = fold_batch_norms(traced).traced
    nodes = {name: node for name, node, _ in layers(folded)}
    sums = [node for node in nodes.values() if node.meta["op"] == "add" and len(tensor_inputs(node)) > 1]
    summands = [source for node in sums for source in tensor_inputs(node)]
    found, left = dict(specs), set()
    for name in (*_giving(summands, CHOOSES), *(str(node.meta["layer"]) for node in sums)):
        if _leave(found, name, own):
            left.add(name)
    for name, node in nodes.items():
        sources = [source_of(source, MOVED).meta.get("layer") for source in tensor_inputs(node)]
        if name in left or left.isdisjoint(sources):
            continue
        if node.meta["op"] in CHOOSES and _leave(found, name, own):
            left.add(name)
        elif node.meta["op"] not in WEIGHTED | INTEGER_OPS and "quantize_inputs" not in own.get(name, {}):
            found[name] = replace(found[name], quantize_inputs=False)
    return found


def with_fused_sums(traced: fx.GraphModule, specs: Specs, own: Own) -> dict[str, LayerSpec]:
    """The specs with one summand of each sum as it comes from a layer's accumulator, not rounded before.

    As kernels compute that add to a convolution's accumulator what is there already: of the convolutions and
    linear layers that only the sum reads it is the last to run. The sum is rounded once.

    Args:
        traced, specs, own: as for with_float_output.
    """
    folded = fold_batch_norms(traced).traced
    place = {node: number for number, node in enumerate(folded.graph.nodes)}
    found = dict(specs)
    for name, node, _ in layers(folded):
        if node.meta["op"] != "add" or not computes_only_tensors(node) or specs[name].output is None:
            continue
        given = [(index, source_of(source)) for index, source in enumerate(tensor_inputs(node))]
        fit = [(place[giver], index, giver) for index, giver in given if _feeds_only(giver, node, specs)]
        if fit:
            _, index, giver = max(fit)
            if _leave(found, giver.meta["layer"], own):
                found[name] = replace(found[name], carried=index)
    return found


def with_kept_grids(traced: fx.GraphModule, specs: Specs, own: Own) -> dict[str, LayerSpec]:
    """The specs with max pools that hand on the grid of what they read.

    Args:
        traced, specs, own: as for with_float_output.
    """
    found = dict(specs)
    for name, node, _ in layers(traced):
        if node.meta["op"] in ops.MAX_POOLS and name in found and "bits_activations" not in own.get(name, {}):
            found[name] = replace(found[name], on_input_grid=True)
    return found


def _feeds_only(giver: fx.Node, reader: fx.Node, specs: Specs) -> bool:
    """Whether a node is a layer with integer weights and an output on a grid that one other reads alone."""
    spec = specs.get(giver.meta.get("layer", ""))
    on_integers = spec is not None and spec.weight is not None and spec.output is not None
    return on_integers and giver.meta["op"] in WEIGHTED and readers(giver) == [reader]


def _giving(values: Iterable[fx.Node], through: frozenset[str], anything: bool = False) -> list[str]:
    """The layers that give some values, seen through moves and some operations, which are among them.

    Args:
        values: nodes of a network.
        through: operations that are left in float along with what they read.
        anything: whether layers of all operations count; else only those with weights.
    """
    found: dict[str, None] = {}
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        name = node.meta.get("layer")
        if name is None:
            waiting += tensor_inputs(node) if node.meta.get("op") in MOVED else []
        elif name not in found and (anything or node.meta["op"] in WEIGHTED | through):
            found[name] = None
            waiting += tensor_inputs(node) if node.meta["op"] in through else []
    return list(found)


def _leave(found: dict[str, LayerSpec], name: str, own: Own) -> bool:
    """Leave the output of a layer in float, unless its override says something of its bits.

    Returns:
        Whether it is in float now.
    """
    spec = found.get(name)
    if spec is None or "bits_activations" in own.get(name, {}):
        return spec is None
    if spec.output is not None:
        found[name] = replace(spec, output=None, input=spec.input or spec.output)
    return True
