"""Networks as ONNX models: quantized ones with QuantizeLinear and DequantizeLinear at qtool's own grids."""

from __future__ import annotations

from typing import Any

from torch import fx

from qtool.deploy.onnx.lower import Written, write_network
from qtool.deploy.onnx.writer import NEWEST_OPSET, OLDEST_OPSET
from qtool.errors import ConfigError
from qtool.quantizers.prepare import QuantizedModel

__all__ = ["NEWEST_OPSET", "OLDEST_OPSET", "Written", "float_model", "qdq_model", "to_model"]

ONNX, ONNX_FLOAT = "onnx", "onnx-float"


def qdq_model(model: QuantizedModel, shape: tuple[int, ...], opset: int = NEWEST_OPSET) -> Written:
    """A quantized network with the scales, zero points and integers that it has.

    Args:
        model: quantized with static ranges.
        shape: (C, H, W) of an image.
        opset: OLDEST_OPSET to NEWEST_OPSET; before 21 there are no integers of 4 and of 16 bits.

    Raises:
        ConfigError: if its grids are found at run time, a layer cannot be written, or onnx is missing.
    """
    if model.plan.dynamic:
        raise ConfigError(
            f"--format {ONNX}: QuantizeLinear needs grids that are known beforehand, and --qe-dynamic finds "
            "them batch by batch; quantize without it"
        )
    return write_network(model.network, model.plan.layers, shape, opset, f"--format {ONNX}")


def float_model(folded: fx.GraphModule, shape: tuple[int, ...], opset: int = NEWEST_OPSET) -> Written:
    """A float network, batch norms folded.

    Args:
        folded: the traced network.
        shape: (C, H, W) of an image.
        opset: OLDEST_OPSET to NEWEST_OPSET.

    Raises:
        ConfigError: if a layer cannot be written, or onnx is missing.
    """
    return write_network(folded, {}, shape, opset, f"--format {ONNX_FLOAT}")


# What a protocol buffer holds at most.
LARGEST_BYTES = 2**31 - 1


def to_model(written: Written, name: str) -> Any:
    """The onnx.ModelProto, checked; its number of images is free.

    Args:
        written: the graph.
        name: of the graph.

    Raises:
        ConfigError: if it exceeds what one file can hold.
    """
    onnx, w = written.w.onnx, written.w
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    image = helper.make_tensor_value_info(w.input, floats, ["N", *written.shape])
    results = [
        helper.make_tensor_value_info(output, floats, ["N", *[None] * (dims - 1)] if dims else [])
        for output, dims in written.outputs.items()
    ]
    graph = helper.make_graph(w.nodes, name, [image], results, initializer=w.initializers)
    opsets = [helper.make_opsetid("", w.opset)]
    model = helper.make_model(graph, producer_name="qtool", opset_imports=opsets)
    model.ir_version = helper.find_min_ir_version_for(opsets)
    if model.ByteSize() > LARGEST_BYTES:
        raise ConfigError(
            f"--format: the model has {model.ByteSize() / 2**30:.1f} GiB, and one file holds 2; fewer bits "
            "for weights, or a smaller network"
        )
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)
