"""Layer by layer, how the integers of an exported network in onnxruntime differ from qtool's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.deploy.onnx.extra import load_extra
from qtool.deploy.onnx.lower import Written
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.parity import CHUNK, Difference
from qtool.quantizers.prepare import QuantizedModel


def onnx_parity(model: QuantizedModel, written: Written, proto: Any, x: Tensor) -> dict[str, Difference]:
    """Compare on one batch, by layer name.

    Args:
        model: the simulation.
        written: what it was written as.
        proto: the onnx.ModelProto of that.
        x: an input batch; the integers of so many images as CHUNK are in memory at a time.
    """
    names = list(written.layers)
    if not names:
        return {}
    network = OnnxNetwork(_with_integers(written, proto))
    tensors = [written.layers[name].integers for name in names]
    parts: dict[str, list[tuple[float, Difference]]] = {name: [] for name in names}
    for chunk in torch.split(x, CHUNK):
        expected = model.integers(chunk)
        for name, found in zip(names, network.run(chunk, tensors), strict=True):
            difference = Difference.of(found.to(torch.int64), expected[name])
            parts[name].append((len(chunk) / len(x), difference))
    return {name: Difference.over(found) for name, found in parts.items()}


def _with_integers(written: Written, proto: Any) -> bytes:
    """The model with the integers of every layer among its outputs."""
    onnx = load_extra("onnx", "--verify")
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for layer in written.layers.values():
        copied.graph.output.append(onnx.helper.make_empty_tensor_value_info(layer.integers))
    content: bytes = copied.SerializeToString()
    return content


def differences_text(layers: Mapping[str, Difference]) -> str:
    """The comparison in a line."""
    if not layers:
        return "no layer gives integers"
    different = [name for name, layer in layers.items() if layer.largest]
    if not different:
        return f"all integers of {len(layers)} layers equal"
    name, worst = min(layers.items(), key=lambda item: item[1].equal)
    return (
        f"integers of {len(layers)} layers: first different layer {different[0]}; largest difference "
        f"{max(layer.largest for layer in layers.values())} steps, at least "
        f"{int(worst.equal * 1e5) / 1e3:.3f} % of values equal ({name})"
    )
