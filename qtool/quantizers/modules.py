"""Modules that compute on quantized values.

They pass centered integers `x_q - zero_point`, held in float32, to each other (see
numerics/affine.py). Quantize and Dequantize stand where a float part of the network begins or ends.

An accumulator in float32 is exact while its partial sums stay below 2^24; a convolution kernel that
transforms its input (Winograd) is off by small fractions even then, so the accumulator is rounded
back to integers before anything is done with it. Where the weights and the grid of the input show that no
sum goes beyond 2^24, and the kernel is known to add up products, there is nothing to round; and where no
sum reaches the ends of the accumulator, nothing to saturate. Both are left out there.

Weights of two-dimensional convolutions lie in memory with the channels last, which is the order that CPU
kernels are fastest in; activations follow them. See layout.py for what cannot read that order.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


# What a convolution is, apart from its weights.
GEOMETRY = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode")


class QuantWeighted(nn.Module):
    """A convolution, transposed convolution or linear layer on integers.

    Args:
        layer: the float module, for its geometry; its own weights are not kept.
        weight: centered integers, in the layer's layout.
        bias: (C,) integers at the accumulator's scale, or None.
        requantize: the output stage.
        accum_bits: width of the accumulator.
        accum_dtype: float32, exact up to 2^24, or float64, exact up to 2^53.
        largest_input: magnitude that the input's integers have at most, where that is known.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        requantize: Requantize,
        accum_bits: int,
        accum_dtype: torch.dtype,
        largest_input: float = math.inf,
    ) -> None:
        super().__init__()
        self.compute = weighted_function(layer)
        self.geometry = {key: getattr(layer, key) for key in GEOMETRY if hasattr(layer, key)}
        self.accum_bits = accum_bits
        channels_first = not isinstance(layer, TRANSPOSED)
        sums = largest_sum(weight, bias, largest_input) if channels_first else math.inf
        self.saturates = sums >= 2.0 ** (accum_bits - 1)
        self.exact = sums <= EXACT_SUMS[accum_dtype]
        if isinstance(layer, nn.Conv2d):
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight.to(accum_dtype), persistent=False)
        if bias is not None:
            trailing = 0 if isinstance(layer, nn.Linear) else weight.dim() - 2
            bias = bias.to(accum_dtype).reshape(-1, *[1] * trailing)
        self.register_buffer("bias", bias, persistent=False)
        self.requantize = requantize
        shift = None if bias is None else (bias.double() * requantize.ratio.double()).float()
        self.register_buffer("shift", shift, persistent=False)

    def accumulate(self, x: Tensor) -> Tensor:
        """The integer accumulator, bias included, saturated."""
        accumulator = self._sums(x)
        if self.bias is not None:
            accumulator.add_(self.bias)
        return clamp_accumulator(accumulator, self.accum_bits) if self.saturates else accumulator

    def _sums(self, x: Tensor) -> Tensor:
        """The accumulator without the bias."""
        x = x.to(self.weight.dtype)
        sums = self.compute(x, self.weight, None)
        return sums if self.exact and adds_up_products(x.device) else sums.round_()

    def forward(self, x: Tensor) -> Tensor:
        whole = (self.accumulate(x),) if self.saturates else (self._sums(x), self.shift)
        result: Tensor = self.requantize(*whole)
        return result.float()


# Integers up to here, and all sums of them that stay below, are exact in a float type.
EXACT_SUMS = {torch.float32: 2.0**24, torch.float64: 2.0**53}


def largest_sum(weight: Tensor, bias: Tensor | None, largest_input: float) -> float:
    """A magnitude that no sum of a layer exceeds, in whatever order its products are added up.

    Args:
        weight: (C_out, ...), centered integers, float32.
        bias: (C_out,), integers, or None.
        largest_input: magnitude of the input's integers.
    """
    # Sums beyond 2^24 are off by so little here that they stay far beyond what matters.
    sums = weight.abs().flatten(1).sum(dim=1).double() * largest_input
    return float((sums if bias is None else sums + bias.double().abs()).max())


def adds_up_products(device: torch.device) -> bool:
    """Whether convolutions on a device are known to add up products, so that integers stay integers.

    oneDNN's direct convolutions and matrix products do, on x86. What torch takes instead of oneDNN, or on
    other processors, may transform its input.
    """
    onednn: Any = torch.backends.mkldnn
    return device.type == "cpu" and IS_X86 and bool(onednn.is_available() and onednn.enabled)


IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weighted_function(layer: nn.Module) -> Callable[..., Tensor]:
    """The computation of a convolution or linear layer, as a function of input, weight and bias or None."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # The layer's own method knows every padding mode.
        geometry = _without_parameters(layer)
        return lambda x, weight, bias=None: geometry._conv_forward(x, weight, bias)
    transposed = dict(
        zip(TRANSPOSED, (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), strict=True)
    )
    function: Any = next(f for base, f in transposed.items() if isinstance(layer, base))
    keys = ("stride", "padding", "output_padding", "groups", "dilation")
    settings = {key: getattr(layer, key) for key in keys}
    return lambda x, weight, bias=None: function(x, weight, bias, **settings)


def _without_parameters(layer: Any) -> Any:
    """A copy of a convolution that keeps its geometry and not its weights."""
    bare = copy.copy(layer)
    bare._parameters = {"weight": None, "bias": None}
    return bare


class QuantEmbedding(nn.Module):
    """Rows of an integer table; the output stays on the weight's grid."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class _Rescaling(nn.Module):
    """Brings each input to the output's scale, rounded, before they are combined."""

    def __init__(
        self,
        inputs: Sequence[QParams],
        output: QParams,
        activation: str | None,
        accum_bits: int,
        scale_approx_bits: int | None = None,
        limit: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.accum_bits = accum_bits
        ratios = [exact_ratio(q.scale.double() / output.scale.double()) for q in inputs]
        if scale_approx_bits is not None:
            ratios = [approximate_multiplier(ratio, scale_approx_bits) for ratio in ratios]
        self.ratios = [float(ratio) for ratio in ratios]
        largest = max(largest_integer(q) * ratio for q, ratio in zip(inputs, self.ratios, strict=True))
        self.saturates = largest + 1 >= 2.0 ** (accum_bits - 1)
        self.clamp = OutputClamp(output, activation, limit)
        self.grid = Grid(output)

    def rescale(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
        """Integers at the output's scale, the first of them in out; the inputs are not changed."""
        places = [out, *[None] * (len(inputs) - 1)]
        pairs = zip(inputs, self.ratios, places, strict=True)
        rescaled = [torch.mul(x, ratio, out=place).round_() for x, ratio, place in pairs]
        if self.saturates:
            rescaled = [clamp_accumulator(x, self.accum_bits) for x in rescaled]
        return rescaled


class QuantAdd(_Rescaling):
    """The sum of two or more quantized tensors."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or any(
            x.shape != inputs[0].shape or x.requires_grad for x in inputs
        ):
            return self._sum(inputs)
        result = torch.empty_like(inputs[0])
        for out, *parts in blocks(result, *inputs):
            self._sum(parts, out)
        return result

    def _sum(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        total, *others = self.rescale(inputs, out)
        for other in others:
            # Rescaling has made it this layer's own.
            total = total.add_(other) if total.shape == other.shape else total + other
        return self.clamp.apply_(total)


class QuantAddOnce(QuantAdd):
    """The sum of two or more quantized tensors, rounded once, as kernels do."""

    def rescale(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
        """The inputs in steps of the output; the first of them in out."""
        places = [out, *[None] * (len(inputs) - 1)]
        return [torch.mul(x, r, out=o) for x, r, o in zip(inputs, self.ratios, places, strict=True)]

    def _sum(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        total, *others = self.rescale(inputs, out)
        for other in others:
            total = total.add_(other) if total.shape == other.shape else total + other
        total = total.round_()
        return self.clamp.apply_(clamp_accumulator(total, self.accum_bits) if self.saturates else total)


class QuantCat(_Rescaling):
    """The concatenation of quantized tensors."""

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        return self.clamp.apply_(torch.cat(self.rescale(tensors), dim))


class QuantProduct(nn.Module):
    """A product of quantized tensors, element by element or of matrices."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], requantize: Requantize, accum_bits: int
    ) -> None:
        super().__init__()
        self.function = function
        self.accum_bits = accum_bits
        self.requantize = requantize

    def forward(self, *inputs: Tensor) -> Tensor:
        total, *others = inputs
        for other in others:
            total = self.function(total, other)
        accumulator = clamp_accumulator(total.round(), self.accum_bits)
        result: Tensor = self.requantize(accumulator)
        return result


class FakeQuantize(nn.Module):
    """A float operation whose output is put on a grid; it gives centered integers."""

    def __init__(
        self,
        operation: nn.Module,
        output: QParams,
        activation: str | None = None,
        limit: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.operation = operation
        self.clamp = OutputClamp(output, activation, limit)
        self.grid = Grid(output)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = self.operation(*args, **kwargs)
        # Division makes a new tensor: the operation may have given back a view of its input.
        return self.clamp.apply_((x / self.grid.scale).round_())


FLOAT_TYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


class Cast(nn.Module):
    """An operation in a float type of its own; it takes and gives float32."""

    def __init__(self, operation: nn.Module, float_bits: int) -> None:
        super().__init__()
        self.dtype = FLOAT_TYPES[float_bits]
        # A copy: the operation may be that of the caller's float network.
        self.operation = copy.deepcopy(operation).to(self.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _cast(self.operation(*_cast(args, self.dtype), **_cast(kwargs, self.dtype)), torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """All float tensors in a nest of tuples, lists and dicts, in another type."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
