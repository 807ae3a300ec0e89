"""What a run did to every layer, as plain values for YAML and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor, fx

from qtool.graph.fold import fold_batch_norms
from qtool.graph.neighbours import fused_activations
from qtool.graph.trace import layers
from qtool.numerics.spec import SETTING_OF_MODE, ClipSpec, LayerSpec, QParams, QuantSpec
from qtool.quantizers import plan as plans
from qtool.quantizers.plan import (
    LayerPlan,
    ModelPlan,
    asked_of_output,
    find_never_negative,
    layer_kind,
    quantizes_output,
)


def layer_quant_params(plan: ModelPlan, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """The effective settings and every parameter of every layer."""
    return {name: _layer_params(layer, specs.get(name)) for name, layer in plan.layers.items()}


def _layer_params(layer: LayerPlan, spec: LayerSpec | None) -> dict[str, Any]:
    found: dict[str, Any] = {"op": layer.op, "computes": layer.kind}
    if layer.note:
        found["note"] = layer.note
    found["bits_activations"] = layer.output.spec.num_bits if layer.output is not None else None
    found["bits_weights"] = layer.weight.spec.num_bits if layer.weight is not None else None
    if layer.activation:
        found["activation"] = layer.activation
    if layer.activation_limit is not None:
        found["activation_limit"] = _number_or_list(layer.activation_limit.flatten())
    if spec is not None and layer.kind in (plans.INTEGER, plans.FAKE):
        found |= _clipping("activations", spec.clip)
    if spec is not None and spec.weight_clip is not None and layer.weight is not None:
        found |= _clipping("weights", spec.weight_clip)
    if layer.kind == plans.INTEGER:
        found["bits_accum"] = layer.accum_bits
        if layer.scale_approx_bits is not None:
            found["scale_approx_bits"] = layer.scale_approx_bits
            found["scale_approx_everywhere"] = layer.everywhere_bits is not None
        if layer.accum_scale is not None:
            found["accum_scale"] = _number_or_list(layer.accum_scale)
    if layer.sum_once:
        found["add_rounding"] = "sum"
    fresh = {i: _grid(q) for i, q in enumerate(layer.inputs) if q is not None}
    found |= {"inputs": fresh} if fresh else {}
    found |= {"output": _grid(layer.output)} if layer.output is not None else {}
    found |= {"weight": _grid(layer.weight)} if layer.weight is not None else {}
    return found


def _clipping(what: str, clip: ClipSpec) -> dict[str, Any]:
    """A clip mode and the setting that it reads, if any, as a YAML file has them."""
    found: dict[str, Any] = {f"clip_{what}": clip.mode}
    if clip.mode in SETTING_OF_MODE:
        setting = SETTING_OF_MODE[clip.mode]
        found[f"clip_{setting}" + ("_weights" if what == "weights" else "")] = getattr(clip, setting)
    if clip.to_observed:
        found["clip_to_observed"] = True
    return found


def _grid(qparams: QParams) -> dict[str, Any]:
    return {
        "mode": qparams.spec.mode,
        "num_bits": qparams.spec.num_bits,
        "scale": _number_or_list(qparams.scale),
        "zero_point": _number_or_list(qparams.zero_point.long()),
    }


def _number_or_list(values: Tensor) -> Any:
    return values.tolist()


def layer_table(traced: fx.GraphModule, specs: Mapping[str, LayerSpec]) -> str:
    """All layers of a network: name, operation, output shape of one image, and what is done with them."""
    folded = fold_batch_norms(traced)
    nodes = {name: node for name, node, _ in layers(folded.traced)}
    quantized = {n for n, node in nodes.items() if quantizes_output(node, specs.get(n))}
    taken_over = fused_activations(folded.traced, quantized)
    fused = {activation: name for name, (activation, _) in taken_over.items()}
    never_negative = find_never_negative(folded.traced, specs, quantized, taken_over)
    rows = [("layer", "operation", "output", "quantization")]
    for name, node, _ in layers(traced):
        if name in folded.pairs:
            treatment = f"folded into {folded.pairs[name]}"
        elif name in fused:
            treatment = f"computed by {fused[name]}"
        else:
            treatment = _treatment(nodes[name], specs.get(name), never_negative)
        rows.append((name, node.meta["op"], _shape(node.meta["value"]), treatment))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(f"{row[c]:<{widths[c]}}" for c in range(3)) + f"  {row[3]}" for row in rows)


def _shape(value: Any) -> str:
    return "x".join(str(n) for n in value.shape[1:]) if isinstance(value, Tensor) else "several"


def _treatment(node: fx.Node, spec: LayerSpec | None, never_negative: Set[fx.Node]) -> str:
    kind, note = layer_kind(node, spec, fused_away=False)
    if kind == plans.FLOAT or spec is None:
        return f"float ({note})"
    weight = spec.weight
    parts = (
        [f"weights {_grid_name(weight)}{_clipped(spec.weight_clip)}"]
        if weight and kind in _WITH_WEIGHTS and _has_weight(node)
        else []
    )
    if spec.output is not None and kind in (plans.INTEGER, plans.FAKE):
        output = asked_of_output(node, spec, never_negative)
        kept = spec.on_input_grid and spec.output_range is None
        parts.append(
            "output on its input's grid" if kept else f"output {_grid_name(output)}{_clipped(spec.clip)}"
        )
    if kind == plans.WEIGHTS_ONLY and spec.input is not None:
        parts.append("output in float")
    in_float = f" (input {spec.carried} in float)" if spec.carried is not None else " (computes in float)"
    return ", ".join(parts) + (in_float if kind == plans.FAKE else "")


_WITH_WEIGHTS = (plans.INTEGER, plans.WEIGHTS_ONLY, plans.EMBEDDING)


def _has_weight(node: fx.Node) -> bool:
    return node.meta["op"] in plans.WEIGHTED or node.meta["op"] == "embedding"


def _clipped(clip: ClipSpec | None) -> str:
    return "" if clip is None or clip.mode == "none" else f" clipped by {clip.mode}"


def _grid_name(spec: QuantSpec) -> str:
    return f"{spec.num_bits}-bit {spec.mode}{' per channel' if spec.axis is not None else ''}"
