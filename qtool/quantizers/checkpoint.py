"""A quantized network as plain data, safe to load with weights_only=True.

A mapping with

    format      "qtool-quantized", and version 1
    layers      by layer name, the fields of LayerPlan; a grid is a mapping of scale, zero_point and
                the fields of QuantSpec; integers are stored in the smallest integer type
    float_state the parameters of whatever stays in float
    model       what the caller adds to find the architecture again

No float weights of quantized layers are kept or needed: only the geometry of the architecture.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.graph.fold import fold_batch_norms, output_channels_first
from qtool.graph.trace import layers, trace
from qtool.numerics.spec import ClipSpec, InputSpec, QParams, QuantSpec
from qtool.quantizers import plan as plans
from qtool.quantizers.plan import DynamicSpec, LayerPlan, ModelPlan
from qtool.quantizers.prepare import QuantizedModel, build

FORMAT = "qtool-quantized"
VERSION = 1


def to_checkpoint(model: QuantizedModel, **model_info: Any) -> dict[str, Any]:
    """The content of a checkpoint file.

    Args:
        model: the quantized network.
        model_info: plain values that the caller needs to build the architecture again.
    """
    # The weights of a weights-only layer follow from its integers.
    derived = tuple(f"{n}." for n, layer in model.plan.layers.items() if layer.kind == plans.WEIGHTS_ONLY)
    state = {
        k: v.cpu() for k, v in model.network.state_dict().items() if not k.startswith(derived or ("\0",))
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": model_info,
        "per_sample": model.plan.per_sample,
        "layers": {name: _layer_to_dict(layer) for name, layer in model.plan.layers.items()},
        "float_state": state,
    }


def from_checkpoint(content: dict[str, Any], architecture: nn.Module, example: Tensor) -> QuantizedModel:
    """Build the quantized network of a checkpoint.

    Args:
        content: from to_checkpoint, read back.
        architecture: the float network; its weights do not matter.
        example: an input batch of the shape it takes.

    Raises:
        ModelError: if the checkpoint is malformed, of a newer version, or of another network.
    """
    if not is_quantized(content):
        raise ModelError("not a quantized model of qtool: it has no entry format = 'qtool-quantized'")
    if content.get("version") != VERSION:
        raise ModelError(
            f"written by another version of qtool: format version {content.get('version')}, "
            f"this one reads {VERSION}"
        )
    folded = fold_batch_norms(trace(architecture, example, check=False))
    try:
        plan = ModelPlan(
            {name: _layer_from_dict(d) for name, d in content["layers"].items()},
            per_sample=bool(content.get("per_sample", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"a damaged quantized model: {type(error).__name__}: {error}") from error
    names = {node.meta["layer"] for node in folded.traced.graph.nodes if "layer" in node.meta}
    if names != set(plan.layers):
        different = sorted(names ^ set(plan.layers))
        raise ModelError(
            f"a quantized model of another network: {len(different)} layer names differ, "
            f"such as {different[0]!r}"
        )
    for name, _, module in layers(folded.traced):
        stored = plan.layers[name].weight_q
        if stored is not None and stored.shape != output_channels_first(module).shape:
            raise ModelError(
                f"a quantized model of another network: layer {name!r} has weights of shape "
                f"{tuple(stored.shape)}"
            )
    try:
        model = build(folded, plan)
        _add_biases(model.network, content["float_state"])
        missing, unexpected = model.network.load_state_dict(content["float_state"], strict=False)
    except (RuntimeError, KeyError, TypeError, AssertionError) as error:
        raise ModelError(
            f"a quantized model of another network: {' '.join(str(error).split())[:200]}"
        ) from error
    derived = tuple(f"{n}." for n, layer in plan.layers.items() if layer.kind == plans.WEIGHTS_ONLY)
    missing = [key for key in missing if not key.startswith(derived or ("\0",))]
    if missing or unexpected:
        raise ModelError(
            f"a quantized model of another network: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model


def _add_biases(network: nn.Module, state: dict[str, Any]) -> None:
    """Room for the biases that corrections gave to layers that stay in float and had none, in place."""
    for name, module in network.named_modules():
        stored = state.get(f"{name}.bias")
        if isinstance(stored, Tensor) and module._parameters.get("bias", stored) is None:
            module.bias = nn.Parameter(torch.zeros_like(stored), requires_grad=False)


def is_quantized(content: object) -> bool:
    """Whether the content of a checkpoint file is a quantized model of qtool."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def _layer_to_dict(layer: LayerPlan) -> dict[str, Any]:
    return {f.name: _plain(getattr(layer, f.name)) for f in fields(layer)}


def _plain(value: Any) -> Any:
    if isinstance(value, QParams):
        return {"scale": value.scale, "zero_point": value.zero_point, **asdict(value.spec)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, DynamicSpec):
        return {**asdict(value), "inputs": [None if i is None else asdict(i) for i in value.inputs]}
    return value


def _layer_from_dict(tree: dict[str, Any]) -> LayerPlan:
    values = {name: _restored(value) for name, value in tree.items()}
    values["inputs"] = tuple(_restored(item) for item in tree["inputs"])
    if tree.get("dynamic") is not None:
        values["dynamic"] = _restored_dynamic(tree["dynamic"])
    return LayerPlan(**values)


def _restored_dynamic(tree: dict[str, Any]) -> DynamicSpec:
    inputs = tuple(
        None if i is None else InputSpec(QuantSpec(**i["grid"]), ClipSpec(**i["clip"]))
        for i in tree["inputs"]
    )
    return DynamicSpec(QuantSpec(**tree["output"]), ClipSpec(**tree["clip"]), inputs, tree["activation"])


def _restored(value: Any) -> Any:
    if not isinstance(value, dict) or "scale" not in value:
        return value
    spec = {f.name: value[f.name] for f in fields(QuantSpec)}
    scale, zero_point = value["scale"], value["zero_point"]
    if not isinstance(scale, Tensor) or not bool((scale > 0).all() and torch.isfinite(scale).all()):
        raise ValueError("a scale that is not positive")
    return QParams(scale, zero_point, QuantSpec(**spec))
