"""Convolutions and linear layers in a form that names their kernel, for files that any engine may load."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from qtool.deploy.native.containers import LARGEST, Container, make_quantized, within_channels


class Kernel(nn.Module):
    """oneDNN's convolution or linear layer of plain integers, which packs its weight when it first runs.

    torch.jit compiles this class: tracing records neither the packing, which is to happen once and where the
    file has been loaded, nor an empty list of optional numbers.

    Args:
        weights: a weights.PackedWeights, symmetric.
        geometry: a kernels.Geometry; None for a linear layer.
        source_zero_point: of the input, uint8.
        output_zero_point: of the result, uint8; None for one in float.
    """

    packed_once: Optional[Tensor]  # noqa: UP045 - TorchScript reads it
    weight: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Optional[Tensor]  # noqa: UP045

    def __init__(
        self, weights: Any, geometry: Any, source_zero_point: int, output_zero_point: int | None
    ) -> None:
        super().__init__()
        channels = weights.integers.shape[0]
        self.register_buffer("weight", weights.integers)
        self.register_buffer("scales", weights.scales.float().expand(channels).contiguous())
        self.register_buffer("zero_points", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("bias", weights.bias)
        self.is_linear = geometry is None
        self.stride = [1] if geometry is None else geometry.stride
        self.padding = [0] if geometry is None else geometry.padding
        self.dilation = [1] if geometry is None else geometry.dilation
        self.groups = 1 if geometry is None else geometry.groups
        self.x_zero_point = source_zero_point
        self.y_zero_point = 0 if output_zero_point is None else output_zero_point
        self.in_float = output_zero_point is None
        self.packed_once = None

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed_once
        if packed is None:
            if self.is_linear:
                packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
            else:
                packed = torch.ops.onednn.qconv_prepack(
                    self.weight, self.scales, 1.0, self.x_zero_point,
                    self.stride, self.padding, self.dilation, self.groups,
                )  # fmt: skip
            self.packed_once = packed
        no_scalars: list[int | float | complex | None] = []
        dtype = torch.float32 if self.in_float else torch.uint8
        if self.is_linear:
            return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
                x, 1.0, self.x_zero_point, packed, self.scales, self.zero_points, self.bias,
                1.0, self.y_zero_point, dtype, "none", no_scalars, "",
            )  # fmt: skip
        return torch.ops.onednn.qconv_pointwise(  # type: ignore[no-any-return]
            x, 1.0, self.x_zero_point, packed, self.scales, self.zero_points, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
            1.0, self.y_zero_point, dtype, "none", no_scalars, "",
        )  # fmt: skip


class OnednnConv(nn.Module):
    """A convolution on oneDNN's kernel.

    Args:
        weights, geometry: a weights.PackedWeights and kernels.Geometry; symmetric weights.
        source, output: containers of its input and its result.
        highs: see kernels.channel_highs.
        takes_integers: whether it reads plain uint8, which an own one in front of it gives.
        gives_integers: whether it gives plain uint8, which the one behind it takes.
    """

    highs: Tensor | None

    def __init__(
        self,
        weights: Any,
        geometry: Any,
        source: Container,
        output: Container,
        highs: Tensor | None = None,
        takes_integers: bool = False,
        gives_integers: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("highs", highs)
        self.output = output
        self.takes_integers, self.gives_integers = takes_integers, gives_integers
        self.kernel = torch.jit.script(Kernel(weights, geometry, source.zero_point, output.zero_point).eval())

    def forward(self, x: Tensor) -> Tensor:
        integers: Tensor = self.kernel(x if self.takes_integers else x.int_repr())
        if not self.gives_integers:
            return within_channels(make_quantized(integers, self.output), self.output, self.highs)
        if self.output.high < LARGEST:
            integers = integers.clamp(max=self.output.high)
        return integers if self.highs is None else torch.minimum(integers, self.highs)


class FloatResult(nn.Module):
    """A convolution or linear layer of integers whose accumulator goes back to float.

    Args:
        weights, geometry: as for Kernel; scales and bias in units of the result.
        source: container of its input.
    """

    def __init__(self, weights: Any, geometry: Any, source: Container) -> None:
        super().__init__()
        self.weights = weights
        self.kernel = torch.jit.script(Kernel(weights, geometry, source.zero_point, None).eval())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.kernel(x.int_repr())
        return result


def unpack(program: Any) -> None:
    """Forget what kernels have packed, which no file can hold.

    Args:
        program: a TorchScript module.
    """
    for module in program.modules():
        if hasattr(module, "packed_once"):
            module.packed_once = None
