"""How sums of values on grids are written.

The simulation rounds each summand onto the output's grid, and then adds; a runtime adds, and then rounds. The
two are the same, ties apart, as soon as one of the two summands is on the output's grid. So one is put there
first, wide enough for what can matter of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qtool.deploy.onnx.grids import integer_type, type_limits
from qtool.deploy.onnx.writer import Writer
from qtool.numerics.spec import QParams


@dataclass(frozen=True)
class Summand:
    """A value that is added.

    Args:
        name: of its tensor of floats.
        grid: that it is on.
    """

    name: str
    grid: QParams

    def steps(self, output: QParams) -> tuple[int, int]:
        """The smallest and largest value of its grid, in steps of another."""
        zero_point = float(self.grid.zero_point)
        ratio = float(self.grid.scale) / float(output.scale)
        ends = [(end - zero_point) * ratio for end in (self.grid.spec.quant_min, self.grid.spec.quant_max)]
        return round(ends[0]), round(ends[1])


def write_sum(w: Writer, a: Summand, b: Summand, output: QParams, name: str) -> str:
    """The sum of two values, up to its grid.

    Args:
        w: the graph.
        a, b: the summands.
        output: the grid of the sum.
        name: for the result.
    """
    if float(output.scale) in (float(a.grid.scale), float(b.grid.scale)):
        return w.op("Add", [a.name, b.name], name)
    for index, (x, other) in enumerate(((a, b), (b, a))):
        dtype, zero_point = _container(w, x, other, output)
        if dtype is not None:
            rounded = _rounded(w, x.name, output, dtype, zero_point, f"{name}_summand")
            return w.op("Add", [rounded, b.name] if index == 0 else [a.name, rounded], name)
    if w.opset >= 21:
        a = Summand(_rounded(w, a.name, output, "int16", 0, f"{name}_summand"), output)
    return w.op("Add", [a.name, b.name], name)


def _container(w: Writer, x: Summand, other: Summand, output: QParams) -> tuple[str | None, int]:
    """The type of the output's integers, and a zero point with which it holds what matters of x, if any.

    What x is beyond the point where every value of the other leads out of the output's range does not matter.
    """
    dtype = integer_type(output.spec, w.opset)
    smallest, largest = type_limits(dtype)
    zero_point = int(output.zero_point)
    (low, high), (other_low, other_high) = x.steps(output), other.steps(output)
    low = max(low, output.spec.quant_min - zero_point - other_high)
    high = min(high, output.spec.quant_max - zero_point - other_low)
    fits = high - low <= largest - smallest and low <= 0 <= high
    return (dtype, smallest - low) if fits else (None, 0)


def _rounded(w: Writer, source: str, output: QParams, dtype: str, zero_point: int, name: str) -> str:
    scale = w.array(np.float32(float(output.scale)).reshape(()), f"{name}_scale")
    zero = w.array(np.array(zero_point, dtype=dtype), f"{name}_zero_point")
    x_q = w.op("QuantizeLinear", [source, scale, zero], f"{name}_quantized")
    if not dtype.endswith("16"):  # keeps this rounding apart from the one before, see put_on_grid
        x_q = w.op("Clip", [x_q, *(w.number(end, dtype) for end in type_limits(dtype))], f"{name}_apart")
    return w.op("DequantizeLinear", [x_q, scale, zero], name)
