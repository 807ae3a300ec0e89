"""What a quantized network costs, told from its plan: bytes of weights, and bit operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from qtool.graph.macs import count_macs
from qtool.graph.trace import layers
from qtool.quantizers.plan import INTEGER, LayerPlan, ModelPlan
from qtool.quantizers.plan.derived import grids_read, value_grids

FLOAT_BITS = 32


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Args:
        size_bytes: of its parameters, those that are on no grid in float32.
        size_share: of the float network's.
        bit_operations_share: of the float network's; one multiply-accumulate of a weight of m bits and an
            activation of n bits is m * n bit operations.
        float_macs_share: of the multiply-accumulates, those that are computed in float.
    """

    size_bytes: int
    size_share: float
    bit_operations_share: float
    float_macs_share: float


def costs(traced: fx.GraphModule, plan: ModelPlan) -> Costs:
    """The costs of a planned network.

    Args:
        traced: the float network, batch norms folded.
        plan: of the same network.
    """
    size, float_size = _sizes(traced, plan)
    grids = value_grids(traced, plan.layers)
    macs = count_macs(traced)
    total = sum(work.count for work in macs.values())
    operations = in_float = 0.0
    for name, node, _ in layers(traced):
        count = macs[name].count if name in macs else 0.0
        layer = plan.layers[name]
        read = [FLOAT_BITS if g is None else g.spec.num_bits for g in grids_read(node, layer, grids)]
        operations += count * _bits_of_product(layer, read)
        in_float += 0.0 if layer.kind == INTEGER else count
    scale = FLOAT_BITS * FLOAT_BITS * total
    return Costs(
        size,
        size / float_size if float_size else 1.0,
        operations / scale if total else 0.0,
        in_float / total if total else 0.0,
    )


def _bits_of_product(layer: LayerPlan, read: list[int]) -> int:
    """Bits of the two factors of a layer's products, multiplied."""
    if layer.kind != INTEGER:
        weight = FLOAT_BITS if layer.weight is None else layer.weight.spec.num_bits
        return weight * FLOAT_BITS
    if layer.weight is not None:
        return layer.weight.spec.num_bits * read[0]
    return math.prod(read[:2])


def _sizes(traced: fx.GraphModule, plan: ModelPlan) -> tuple[int, int]:
    """Bytes of the parameters, and of those of the float network; what layers share counts once."""
    total = sum(p.numel() * FLOAT_BITS // 8 for p in traced.parameters())
    saved, seen = 0, set()
    for name, _, module in layers(traced):
        layer = plan.layers[name]
        if layer.weight_q is not None and layer.weight is not None and id(module.weight) not in seen:
            seen.add(id(module.weight))
            numbers = layer.weight_q.numel()
            saved += numbers * FLOAT_BITS // 8 - math.ceil(numbers * layer.weight.spec.num_bits / 8)
    return total - saved, total
