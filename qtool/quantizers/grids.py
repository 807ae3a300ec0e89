"""Where values come onto a grid and leave it.

Modules that compute on quantized values pass centered integers `x_q - zero_point`, held in float32, to each
other (see numerics/affine.py). Quantize and Dequantize stand where a float part of the network begins or
ends; Requantize ends every quantized layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtool.numerics.affine import along_axis, approximate_multiplier, dequantize_centered, quantize_centered
from qtool.numerics.spec import QParams
from qtool.quantizers.blocks import blocks
from qtool.quantizers.limits import OutputClamp


class Grid(nn.Module):
    """A QParams as buffers, so that it moves between devices with its module."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        self.spec = qparams.spec
        self.register_buffer("scale", qparams.scale.clone(), persistent=False)
        self.register_buffer("zero_point", qparams.zero_point.clone(), persistent=False)

    @property
    def qparams(self) -> QParams:
        """The grid as a value."""
        return QParams(self.scale, self.zero_point, self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec.num_bits}-bit {self.spec.mode}"


class Quantize(Grid):
    """Float values to centered integers."""

    def forward(self, x: Tensor) -> Tensor:
        return quantize_centered(x, self.qparams)


class Dequantize(Grid):
    """Centered integers to float values."""

    def forward(self, x: Tensor) -> Tensor:
        return dequantize_centered(x, self.qparams)


class Requantize(nn.Module):
    """The end of every quantized layer: an accumulator to the output's centered integers.

    Args:
        output: the grid of the output.
        accum_scale: units of x per accumulator step: (), or (C,) with axis as output channels.
        activation: None, "relu" or "relu6", computed by the clamp.
        limit: of a ReLU6 whose upper end differs between channels, see LayerPlan.
        scale_approx_bits: see numerics.affine.approximate_multiplier; applied to the ratio.
        num_dims: of the accumulator.
        channel_axis: the accumulator's channel axis.
    """

    ratio: Tensor
    offset: float

    def __init__(
        self,
        output: QParams,
        accum_scale: Tensor,
        activation: str | None = None,
        scale_approx_bits: int | None = None,
        num_dims: int = 4,
        channel_axis: int = 1,
        limit: Tensor | None = None,
    ) -> None:
        super().__init__()
        ratio = exact_ratio(accum_scale.double() / output.scale.double())
        if scale_approx_bits is not None:
            ratio = approximate_multiplier(ratio, scale_approx_bits)
        self.register_buffer("ratio", along_axis(ratio.float(), channel_axis, num_dims), persistent=False)
        self.clamp = OutputClamp(output, activation, limit)
        self.grid = Grid(output)
        self.offset = rounding_offset(self.clamp, self.ratio) if scale_approx_bits is None else 0.0

    def forward(self, accumulator: Tensor, bias: Tensor | None = None) -> Tensor:
        """Overwrites the accumulator, which is this layer's own.

        Args:
            accumulator: integers.
            bias: in steps of the output, where the accumulator does not have it yet.
        """
        for (part,) in blocks(accumulator):
            part.mul_(self.ratio)
            if bias is not None:
                part.add_(bias)
            if self.offset:
                part.add_(self.offset).round_().sub_(self.offset)
            else:
                part.round_()
            self.clamp.apply_(part)
        return accumulator


# A multiplier with so many binary places or fewer makes ties of one integer in 2^9 or more.
TIE_BITS = 8


def rounding_offset(clamp: OutputClamp, ratio: Tensor) -> float:
    """What is added before rounding, and taken off after it: the place of 0.0 in an unsigned 8-bit integer.

    The kernels of 8-bit integers add their zero point before they round. In float32 that moves a value which
    lies next to a tie now and then, and every such value moves others in the layers behind. Where ties
    themselves are frequent, values are rounded as they are: to even, whatever the zero point.

    Args:
        clamp: the ends of the output.
        ratio: output steps per accumulator step.
    """
    places = ratio.double() * 2**TIE_BITS
    if clamp.high - clamp.low > 255 or bool((places == places.round()).any()):
        return 0.0
    return -clamp.low


def exact_ratio(ratio: Tensor) -> Tensor:
    """A float64 ratio of scales without the rounding of the scales to float32, where that shows.

    The ratio of approximated scales is often a short binary fraction such as 1/2. Then every second
    integer is a tie, and a multiplier holds it exactly: rounding must not decide those.
    """
    mantissa, exponent = torch.frexp(ratio)
    short = torch.ldexp(torch.round(mantissa * 2**16), exponent - 16)
    return torch.where((short - ratio).abs() < ratio * 2**-22, short, ratio)


def largest_integer(grid: QParams) -> float:
    """The largest magnitude of a per-tensor grid's centered integers."""
    zero_point = float(grid.zero_point)
    return max(abs(grid.spec.quant_min - zero_point), abs(grid.spec.quant_max - zero_point))


def clamp_accumulator(accumulator: Tensor, num_bits: int) -> Tensor:
    """Saturate in place at a signed accumulator of num_bits."""
    return accumulator.clamp_(-(2.0 ** (num_bits - 1)), 2.0 ** (num_bits - 1) - 1)
