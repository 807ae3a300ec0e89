"""Grids of activations as QuantizeLinear, Clip and DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qtool.deploy.onnx.writer import NotInOnnx, Writer
from qtool.numerics.spec import QParams, QuantSpec
from qtool.quantizers.limits import channel_limits, output_limits


@dataclass(frozen=True)
class OnGrid:
    """A value on a grid.

    Args:
        integers: name of the tensor with its integers x_q.
        floats: name of the tensor with the floats that these stand for.
    """

    integers: str
    floats: str


def integer_type(spec: QuantSpec, opset: int, smallest: int = 8) -> str:
    """The integer type that holds a grid, with the grid's own zero point.

    Args:
        spec: the grid.
        opset: version of the operators.
        smallest: bits of the narrowest type to take: 4 for weights.

    Raises:
        NotInOnnx: if the opset has none.

    Example:
        >>> integer_type(QuantSpec(num_bits=4), 21, smallest=4), integer_type(QuantSpec(num_bits=4), 19, 4)
        ('int4', 'int8')
    """
    width = next(w for w in (4, 8, 16) if w >= max(spec.num_bits, smallest))
    if opset < 21 and width == 4:
        width = 8
    if opset < 21 and width == 16:
        raise NotInOnnx(
            f"has {spec.num_bits} bits, and opset {opset} knows 8; --opset 21, or 8 bits or fewer"
        )
    return f"{'int' if spec.signed else 'uint'}{width}"


def type_limits(dtype: str) -> tuple[int, int]:
    """The smallest and largest integer of a type."""
    width = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**width - 1) if dtype.startswith("u") else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)


def put_on_grid(
    w: Writer,
    source: str,
    grid: QParams,
    activation: str | None = None,
    limit: Tensor | None = None,
    apart: bool = False,
) -> OnGrid:
    """Quantize a float tensor as OutputClamp does, and dequantize it.

    The integers that neither the grid nor the activation leaves are clipped as integers, behind the
    QuantizeLinear, so that runtimes find it right behind the layer.

    Args:
        w: the graph.
        source: name of the float tensor.
        grid: one scale and zero point.
        activation, limit: see OutputClamp.
        apart: whether the value is on a grid already. onnxruntime makes one rounding of two that follow each
            other, with other results; it does not where there is a Clip in between, be it of all integers.
    """
    dtype = integer_type(grid.spec, w.opset)
    zero_point = int(grid.zero_point)
    scale = w.array(np.float32(float(grid.scale)).reshape(()), f"{source}_scale")
    zero = w.array(np.array(zero_point, dtype=dtype), f"{source}_zero_point")
    low, high = (int(v) + zero_point for v in output_limits(grid, activation))
    smallest, largest = type_limits(dtype)
    clips = apart or low > smallest or high < largest
    if clips and dtype.endswith("16"):  # runtimes have no Clip of 16-bit integers
        ends = [(v - zero_point) * float(grid.scale) for v in (low, high)]
        source = w.op("Clip", [source, *(w.number(end) for end in ends)], f"{source}_clipped")
    x_q = w.op("QuantizeLinear", [source, scale, zero], f"{source}_quantized")
    if clips and not dtype.endswith("16"):
        x_q = w.op("Clip", [x_q, w.number(low, dtype), w.number(high, dtype)], f"{source}_clipped")
    floats = w.op("DequantizeLinear", [x_q, scale, zero], f"{source}_dequantized")
    if limit is None:
        return OnGrid(x_q, floats)
    highest = channel_limits(grid, limit) * float(grid.scale)
    limited = w.op("Min", [floats, w.tensor(highest.float(), f"{source}_limit")], f"{source}_limited")
    x_q = w.op("QuantizeLinear", [limited, scale, zero], f"{source}_limited_quantized")
    return OnGrid(x_q, w.op("DequantizeLinear", [x_q, scale, zero], f"{source}_limited_dequantized"))


def constant_on_grid(w: Writer, grid: QParams, weight_q: Tensor, name: str, axis: int) -> str:
    """Integers of a weight as a constant, dequantized.

    Args:
        w: the graph.
        grid: one scale and zero point, or one for each index of an axis.
        weight_q: the integers, in the layout that is wanted.
        name: of the tensor of floats.
        axis: of weight_q that a per-channel grid counts.
    """
    dtype = integer_type(grid.spec, w.opset, smallest=4)
    inputs = [
        w.integers(weight_q, f"{name}_quantized", dtype),
        w.tensor(grid.scale.float(), f"{name}_scale"),
        w.integers(grid.zero_point, f"{name}_zero_point", dtype),
    ]
    return w.op("DequantizeLinear", inputs, name, axis=axis if grid.scale.dim() else None)


def integer_bias(w: Writer, bias_q: Tensor, scale: Tensor, name: str) -> str:
    """A bias of 32-bit integers at the accumulator's scale, dequantized; (C,).

    Args:
        w: the graph.
        bias_q: (C,), int64.
        scale: units per step, () or (C,).
        name: of the tensor of floats.
    """
    limit = 2**31
    inputs = [
        w.integers(bias_q.clamp(-limit, limit - 1), f"{name}_quantized", "int32"),
        w.tensor(scale.to(torch.float32), f"{name}_scale"),
    ]
    return w.op("DequantizeLinear", inputs, name, axis=0 if scale.dim() else None)
