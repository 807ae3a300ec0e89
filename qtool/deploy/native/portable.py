"""A convolution in a form that names its kernel, for files that any engine may load."""

from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.native.containers import Container, make_quantized, within_channels


def _convolve(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    weight: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y_scale: float,
    y_zero_point: int,
) -> Tensor:
    """oneDNN's convolution of plain integers, uint8 to uint8. torch.jit compiles this source."""
    packed = torch.ops.onednn.qconv_prepack(
        weight, scales, x_scale, x_zero_point, stride, padding, dilation, groups
    )
    # Tracing cannot record an empty list of optional numbers, so this function is compiled.
    no_scalars: list[int | float | complex | None] = []
    return torch.ops.onednn.qconv_pointwise(  # type: ignore[no-any-return]
        x, x_scale, x_zero_point, packed, scales, zero_points, bias,
        stride, padding, dilation, groups,
        y_scale, y_zero_point, torch.uint8, "none", no_scalars, "",
    )  # fmt: skip


class OnednnConv(nn.Module):
    """A convolution on oneDNN's kernel, by an operation that packs its weights in every call.

    Args:
        weights, geometry: a kernels.PackedWeights and kernels.Geometry; symmetric weights.
        source, output: containers of its input and its result.
        highs: see kernels.channel_highs.
    """

    weight: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None
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
        self.geometry, self.source, self.output = geometry, source, output
        self.convolve = torch.jit.script(_convolve)
        channels = weights.integers.shape[0]
        self.register_buffer("weight", weights.integers)
        self.register_buffer("scales", weights.scales.float().expand(channels).contiguous())
        self.register_buffer("zero_points", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("bias", weights.bias)

    def forward(self, x: Tensor) -> Tensor:
        g, a, b = self.geometry, self.source, self.output
        integers = self.convolve(
            x.int_repr(), 1.0, a.zero_point, self.weight, self.scales, self.zero_points, self.bias,
            g.stride, g.padding, g.dilation, g.groups, 1.0, b.zero_point,
        )  # fmt: skip
        return within_channels(make_quantized(integers, b), b, self.highs)
