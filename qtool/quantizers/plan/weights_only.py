"""The plan of a quantized network with its activations back in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from qtool.graph.neighbours import FUSIBLE, source_of
from qtool.graph.trace import layers, tensor_inputs
from qtool.quantizers.plan.kinds import WEIGHTED
from qtool.quantizers.plan.records import (
    CAST,
    FAKE,
    FLOAT,
    IDENTITY,
    INTEGER,
    WEIGHTS_ONLY,
    LayerPlan,
    ModelPlan,
)


def weights_only(traced: fx.GraphModule, plan: ModelPlan) -> ModelPlan:
    """The plan with the same integers for the weights, and no grids of activations.

    Clamps that are the end of a grid go with it; a ReLU that a layer had taken over is computed again.

    Args:
        traced: the float network, batch norms folded.
        plan: of the same network, static.
    """
    found = {name: _in_float(node, plan.layers) for name, node, _ in layers(traced)}
    return replace(plan, layers={**plan.layers, **found})


def _in_float(node: fx.Node, plans: Mapping[str, LayerPlan]) -> LayerPlan:
    plan = plans[node.meta["layer"]]
    if plan.kind == IDENTITY:
        return replace(plan, kind=FLOAT) if _is_taken_over(node, plans) else plan
    if plan.kind == FAKE and plan.float_bits is not None:
        return LayerPlan(CAST, plan.op, inputs=(None,) * len(plan.inputs), float_bits=plan.float_bits)
    if plan.kind == INTEGER and plan.op in WEIGHTED:
        return LayerPlan(
            WEIGHTS_ONLY,
            plan.op,
            inputs=(None,),
            weight=plan.weight,
            weight_q=plan.weight_q,
            bias=_bias_values(plan),
            accum_bits=plan.accum_bits,
        )
    return LayerPlan(FLOAT, plan.op) if plan.kind in (INTEGER, FAKE) else plan


def _bias_values(plan: LayerPlan) -> Tensor | None:
    """The float bias that a layer's integers stand for, (C,)."""
    if plan.bias_q is None:
        return None
    assert plan.accum_scale is not None
    return (plan.bias_q.double() * plan.accum_scale).float()


def _is_taken_over(node: fx.Node, plans: Mapping[str, LayerPlan]) -> bool:
    """Whether the layer in front of an activation computes it."""
    if node.meta["op"] not in FUSIBLE:
        return False
    (source,) = tensor_inputs(node)
    name = source_of(source).meta.get("layer")
    return name is not None and plans[name].activation == node.meta["op"]
