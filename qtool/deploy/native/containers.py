"""How a grid lies in torch's unsigned 8-bit tensors, and the ways in and out.

    container = centered + zero_point         0 <= container <= high <= 255

torch writes a scale beside the integers of such a tensor. Here it is 1, so that what a kernel multiplies an
accumulator by is the layer's own ratio of requantization, to the last bit of float32: kernels multiply by the
product of all scales, which would be rounded twice more. Operations that need two inputs on one scale are
given a tensor with the scale they need beside the same integers (labelled).

The smallest integer that a layer can give lies at 0, so the kernel's own clamp is exact at that end
and computes a fused ReLU for nothing. What the other end lacks to 255 (grids below 8 bits, symmetric
ones behind a ReLU) is clamped after the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qtool.numerics.spec import QParams
from qtool.quantizers.limits import OutputClamp
from qtool.quantizers.plan import FAKE, LayerPlan

LARGEST = 255


@dataclass(frozen=True)
class Container:
    """The part of an unsigned 8-bit tensor that a grid takes up.

    Args:
        scale: units of x per integer step.
        zero_point: the container's integer that stands for 0.0.
        high: the largest integer in use; the smallest is 0.
    """

    scale: float
    zero_point: int
    high: int

    @property
    def limits(self) -> tuple[float, float]:
        """The smallest and largest value, units of x."""
        return -self.zero_point * self.scale, (self.high - self.zero_point) * self.scale


def container_for(
    qparams: QParams, activation: str | None = None, limit: Tensor | None = None
) -> Container | None:
    """Where a grid's integers lie, those that an activation cuts off left out; None if they need over 8 bits.

    Args:
        qparams: the grid.
        activation: what the values have been through.
        limit: of a ReLU6 whose upper end differs between channels; the container holds all channels.

    Example:
        >>> from qtool.numerics.spec import QuantSpec
        >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
        >>> container_for(QParams(one, zero, QuantSpec(num_bits=4)))
        Container(scale=1.0, zero_point=8, high=15)
        >>> container_for(QParams(one, zero, QuantSpec()), "relu")
        Container(scale=1.0, zero_point=0, high=127)
    """
    if qparams.scale.dim() > 0:
        return None
    clamp = OutputClamp(qparams, activation, limit)
    low, high = int(clamp.low), int(clamp.high)
    if high - low > LARGEST:
        return None
    return Container(float(qparams.scale), -low, high - low)


def clamp_of(plan: LayerPlan) -> str | None:
    """The activation that a layer's output has been through: a fused one, or the layer itself."""
    clamps = {plan.activation, plan.op if plan.kind == FAKE else None}
    return next((name for name in ("relu6", "relu") if name in clamps), None)


def within(x: Tensor, container: Container) -> Tensor:
    """Cut a quantized tensor off at the container's largest integer; the kernel has done so at 0 and 255."""
    if container.high == LARGEST:
        return x
    return torch.clamp(x, -container.zero_point, container.high - container.zero_point)


def within_channels(x: Tensor, container: Container, highs: Tensor | None) -> Tensor:
    """Likewise, and at the largest integer of each channel, uint8, broadcast to an image, if given."""
    x = within(x, container)
    return x if highs is None else make_quantized(torch.minimum(x.int_repr(), highs), container)


class Pack(nn.Module):
    """Centered integers in float32 to a quantized tensor."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Tensor:
        return make_quantized((x + self.container.zero_point).to(torch.uint8), self.container)


class Unpack(nn.Module):
    """A quantized tensor to centered integers in float32."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.zero_point = float(container.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return x.int_repr().float().sub_(self.zero_point)


class FromGrid(nn.Module):
    """A quantized tensor to the floats that it stands for."""

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.scale = container.scale

    def forward(self, x: Tensor) -> Tensor:
        return x.dequantize().mul_(self.scale)


class ToGrid(nn.Module):
    """Float values to a quantized tensor.

    torch.quantize_per_tensor multiplies by 1 / scale, which is another number close to ties; the
    simulation divides by the scale, and so does this.
    """

    def __init__(self, container: Container) -> None:
        super().__init__()
        self.container = container

    def forward(self, x: Tensor) -> Tensor:
        return rounded(x / self.container.scale, self.container)


def rounded(steps: Tensor, container: Container) -> Tensor:
    """Values in steps of a container's grid as a quantized tensor whose scale is 1."""
    return within(torch.quantize_per_tensor(steps, 1.0, container.zero_point, torch.quint8), container)


def make_quantized(integers: Tensor, container: Container) -> Tensor:
    """A quantized tensor of integers, uint8, whose scale is 1."""
    make: Any = torch._make_per_tensor_quantized_tensor
    return make(integers, 1.0, container.zero_point)  # type: ignore[no-any-return]


def labelled(x: Tensor, scale: float) -> Tensor:
    """The integers of a quantized tensor with another scale beside them; nothing is copied."""
    jit: Any = torch.jit
    if jit.is_tracing():
        return _as_program()(x, scale)  # type: ignore[no-any-return]
    make: Any = torch._empty_affine_quantized
    empty: Tensor = make([0], scale=scale, zero_point=x.q_zero_point(), dtype=torch.quint8)
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@cache
def _as_program() -> Any:
    """What TorchScript runs in its place: tracing alone would freeze the shape, or copy."""
    jit: Any = torch.jit
    return jit.script(_labelled_in_program)


def _labelled_in_program(x: Tensor, scale: float) -> Tensor:
    empty = torch._empty_affine_quantized([0], scale=scale, zero_point=x.q_zero_point(), dtype=torch.quint8)
    strides = [x.stride(i) for i in range(x.dim())]
    # A tensor whose memory is taken has to be contiguous; channels-last ones are, in this order.
    flat = x.permute([0, 2, 3, 1]) if x.dim() == 4 and not x.is_contiguous() else x
    if not flat.is_contiguous():
        return torch.ops.quantized.mul_scalar(x, scale / x.q_scale())  # type: ignore[no-any-return]
    return torch.ops.aten.set_(empty, flat, x.storage_offset(), x.size(), strides)  # type: ignore[no-any-return]


def stored(x: Tensor) -> Tensor:
    """The integers of a quantized tensor, uint8, in its own memory; int_repr copies them one by one."""
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


class FloatThenGrid(nn.Module):
    """A float operation whose output goes into a quantized tensor."""

    def __init__(self, operation: nn.Module, container: Container) -> None:
        super().__init__()
        self.operation = operation
        self.to_grid = ToGrid(container)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.to_grid(self.operation(*args, **kwargs))
        return result
