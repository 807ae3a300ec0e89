"""What the bits of a network's tensors cost, in the units of a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from qtool.errors import ConfigError
from qtool.graph.flow import shared_parameters
from qtool.graph.macs import count_macs
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import QParams
from qtool.quantizers.plan import EMBEDDING, WEIGHTED, ModelPlan
from qtool.quantizers.plan.derived import grids_read, value_grids
from qtool.search.groups import source_layer
from qtool.search.mixed_precision import Knob, Product

FLOAT_BITS = 32
SIZE, MEAN, BOPS = "--size-budget", "--mean-bits", "--bops-budget"
WORDS = {
    SIZE: "of the bytes of weights in float32",
    MEAN: "bits per weight",
    BOPS: "of the bit operations at 8 bits",
}


@dataclass(frozen=True)
class Costs:
    """What to minimize under, and how its numbers are said.

    Args:
        unit: the cost that 1 of the budget stands for.
        knobs: with their costs.
        products: what costs bits multiplied.
        fixed: what is spent whatever is chosen.
    """

    unit: float
    knobs: tuple[Knob, ...]
    products: tuple[Product, ...] = ()
    fixed: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """The tensors of a network whose bits are chosen.

    Args:
        weights: name of the knob -> layers whose weights have its bits.
        activations: name of the knob -> layers whose outputs have its bits.
    """

    weights: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def costs(
    flag: str, traced: fx.GraphModule, plan: ModelPlan, tensors: Tensors, knobs: Sequence[Knob]
) -> Costs:
    """The costs that a budget counts.

    Args:
        flag: the budget's.
        traced, plan: the network, quantized in any of the ways.
        tensors: whose bits are chosen.
        knobs: of these, without costs.

    Raises:
        ConfigError: if the network has nothing that costs.
    """
    found = (
        _of_bops(traced, plan, tensors, knobs)
        if flag == BOPS
        else _of_weights(flag, traced, plan, tensors, knobs)
    )
    if not found.unit:
        raise ConfigError(f"{flag}: nothing in this network counts for it")
    return found


def _of_weights(
    flag: str, traced: fx.GraphModule, plan: ModelPlan, tensors: Tensors, knobs: Sequence[Knob]
) -> Costs:
    sizes = weight_sizes(traced)
    chosen = {layer for names in tensors.weights.values() for layer in names}
    of_knob = {knob: sum(sizes.get(layer, 0) for layer in names) for knob, names in tensors.weights.items()}
    priced = tuple(
        replace(k, cost=tuple(float(b * of_knob[k.name]) for b in k.bits)) if k.name in of_knob else k
        for k in knobs
    )
    if flag == MEAN:
        return Costs(float(sum(of_knob.values())), priced)
    others = sum(size * _bits_of_weight(plan, name) for name, size in sizes.items() if name not in chosen)
    return Costs(float(FLOAT_BITS * sum(sizes.values())), priced, (), float(others))


def weight_sizes(traced: fx.GraphModule) -> dict[str, int]:
    """The number of weights of each layer that has any; what several layers share counts for the first."""
    shared = shared_parameters(traced)
    found: dict[str, int] = {}
    for name, node, module in layers(traced):
        weight = getattr(module, "weight", None)
        counts = node.meta["op"] in WEIGHTED | {"embedding"} and isinstance(weight, Tensor)
        if counts and not (name in shared and shared[name] in found):
            assert isinstance(weight, Tensor)
            found[name] = weight.numel()
    return found


def _bits_of_weight(plan: ModelPlan, name: str) -> int:
    weight = plan.layers[name].weight
    return FLOAT_BITS if weight is None else weight.spec.num_bits


def _of_bops(traced: fx.GraphModule, plan: ModelPlan, tensors: Tensors, knobs: Sequence[Knob]) -> Costs:
    """Of convolutions, linear layers and matrix products: multiplications times the bits of both factors."""
    grids = value_grids(traced, plan.layers)
    weight_knob = {layer: knob for knob, names in tensors.weights.items() for layer in names}
    output_knob = {layer: knob for knob, names in tensors.activations.items() for layer in names}
    macs = {name: count.count for name, count in count_macs(traced).items() if count.count}
    costs_of = {knob.name: [0.0] * len(knob.bits) for knob in knobs}
    bits_of = {knob.name: knob.bits for knob in knobs}
    products, fixed = [], 0.0
    for name, node, module in layers(traced):
        if name not in macs:
            continue
        factors = _factors(name, node, module, plan, grids, weight_knob, output_knob)
        one, other = factors
        if isinstance(one, str) and isinstance(other, str) and one != other:
            products.append(Product(one, other, macs[name]))
        elif isinstance(one, str) and isinstance(other, str):
            _add(costs_of[one], [macs[name] * b * b for b in bits_of[one]])
        elif isinstance(one, str):
            _add(costs_of[one], [macs[name] * b * float(other) for b in bits_of[one]])
        elif isinstance(other, str):
            _add(costs_of[other], [macs[name] * b * float(one) for b in bits_of[other]])
        else:
            fixed += macs[name] * one * other
    priced = tuple(replace(knob, cost=tuple(costs_of[knob.name])) for knob in knobs)
    return Costs(64.0 * math.fsum(macs.values()), priced, tuple(products), fixed)


def _add(total: list[float], more: Sequence[float]) -> None:
    total[:] = [a + b for a, b in zip(total, more, strict=True)]


def _factors(
    name: str,
    node: fx.Node,
    module: nn.Module,
    plan: ModelPlan,
    grids: Mapping[fx.Node, QParams | None],
    weight_knob: Mapping[str, str],
    output_knob: Mapping[str, str],
) -> tuple[str | int, str | int]:
    """The knobs, or the bits, of the two tensors that a layer multiplies."""
    layer = plan.layers[name]
    read = grids_read(node, layer, grids)
    fresh = layer.inputs or (None,) * len(read)
    found: list[str | int] = []
    for source, grid, own in zip(tensor_inputs(node), read, fresh, strict=True):
        if grid is None:
            found.append(FLOAT_BITS)
            continue
        giver = name if own is not None else source_layer(source, plan.layers)
        bits = grid.spec.num_bits
        found.append(output_knob.get(giver, bits) if giver is not None and giver in output_knob else bits)
    if layer.op in WEIGHTED or layer.kind == EMBEDDING or isinstance(getattr(module, "weight", None), Tensor):
        found = [found[0], weight_knob.get(name, _bits_of_weight(plan, name))]
    return found[0], found[1] if len(found) > 1 else FLOAT_BITS
