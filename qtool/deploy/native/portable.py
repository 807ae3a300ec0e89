"""A convolution in a form that names its kernel, for files that any engine may load."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from qtool.deploy.native.containers import Container, make_quantized, within_channels


class Kernel(nn.Module):
    """oneDNN's convolution of plain integers, uint8 to uint8, which packs its weight when it first runs.

    torch.jit compiles this class: tracing records neither the packing, which is to happen once and where the
    file has been loaded, nor an empty list of optional numbers.
    """

    packed_once: Optional[Tensor]  # noqa: UP045 - TorchScript reads it
    weight: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Optional[Tensor]  # noqa: UP045

    def __init__(self, weights: Any, geometry: Any, source_zero_point: int, output_zero_point: int) -> None:
        super().__init__()
        channels = weights.integers.shape[0]
        self.register_buffer("weight", weights.integers)
        self.register_buffer("scales", weights.scales.float().expand(channels).contiguous())
        self.register_buffer("zero_points", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("bias", weights.bias)
        self.stride: list[int] = geometry.stride
        self.padding: list[int] = geometry.padding
        self.dilation: list[int] = geometry.dilation
        self.groups: int = geometry.groups
        self.x_zero_point, self.y_zero_point = source_zero_point, output_zero_point
        self.packed_once = None

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed_once
        if packed is None:
            packed = torch.ops.onednn.qconv_prepack(
                self.weight, self.scales, 1.0, self.x_zero_point,
                self.stride, self.padding, self.dilation, self.groups,
            )  # fmt: skip
            self.packed_once = packed
        no_scalars: list[int | float | complex | None] = []
        return torch.ops.onednn.qconv_pointwise(  # type: ignore[no-any-return]
            x, 1.0, self.x_zero_point, packed, self.scales, self.zero_points, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
            1.0, self.y_zero_point, torch.uint8, "none", no_scalars, "",
        )  # fmt: skip


class OnednnConv(nn.Module):
    """A convolution on oneDNN's kernel.

    Args:
        weights, geometry: a kernels.PackedWeights and kernels.Geometry; symmetric weights.
        source, output: containers of its input and its result.
        highs: see kernels.channel_highs.
    """

    highs: Tensor | None

    def __init__(
        self,
        weights: Any,
        geometry: Any,
        source: Container,
        output: Container,
        highs: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("highs", highs)
        self.output = output
        self.kernel = torch.jit.script(Kernel(weights, geometry, source.zero_point, output.zero_point).eval())

    def forward(self, x: Tensor) -> Tensor:
        integers = self.kernel(x.int_repr())
        return within_channels(make_quantized(integers, self.output), self.output, self.highs)


def unpack(program: Any) -> None:
    """Forget what kernels have packed, which no file can hold.

    Args:
        program: a TorchScript module.
    """
    for module in program.modules():
        if hasattr(module, "packed_once"):
            module.packed_once = None
