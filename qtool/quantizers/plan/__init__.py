"""Decide, layer by layer, how a network is quantized: specs and statistics -> LayerPlans."""

from qtool.quantizers.plan.asked import asked_of_inputs, asked_of_output, find_never_negative
from qtool.quantizers.plan.dynamic import plan_dynamic
from qtool.quantizers.plan.kinds import (
    INTEGER_OPS,
    WEIGHTED,
    beyond_float32,
    computes_only_tensors,
    layer_kind,
    quantizes_output,
)
from qtool.quantizers.plan.planner import OP_ACCUM_BITS, chosen_grids, output_ranges, plan_model
from qtool.quantizers.plan.records import (
    CAST,
    DECIDES,
    DYNAMIC,
    DYNAMIC_FAKE,
    EMBEDDING,
    FAKE,
    FLOAT,
    IDENTITY,
    INTEGER,
    NOT_ASKED,
    UNREACHED,
    WEIGHTS_ONLY,
    DynamicSpec,
    LayerPlan,
    ModelPlan,
)

__all__ = [
    "CAST",
    "DECIDES",
    "DYNAMIC",
    "DYNAMIC_FAKE",
    "EMBEDDING",
    "FAKE",
    "FLOAT",
    "IDENTITY",
    "INTEGER",
    "INTEGER_OPS",
    "NOT_ASKED",
    "OP_ACCUM_BITS",
    "UNREACHED",
    "WEIGHTED",
    "WEIGHTS_ONLY",
    "DynamicSpec",
    "LayerPlan",
    "ModelPlan",
    "asked_of_inputs",
    "asked_of_output",
    "beyond_float32",
    "chosen_grids",
    "computes_only_tensors",
    "find_never_negative",
    "layer_kind",
    "output_ranges",
    "plan_dynamic",
    "plan_model",
    "quantizes_output",
]
