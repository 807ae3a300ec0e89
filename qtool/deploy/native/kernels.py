"""Modules that compute on torch's quantized tensors. They take and give unsigned 8-bit ones.

torch's kernels round once, ties to even, and clamp to 0..255; the rest of the container's clamp
follows (see containers.py). An argument `inplace`, which functions such as F.relu have, is False in a
traced network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.native.containers import (
    Container,
    labelled,
    make_quantized,
    rounded,
    stored,
    within,
    within_channels,
)
from qtool.deploy.native.portable import OnednnConv
from qtool.deploy.native.target import engine
from qtool.deploy.native.weights import PackedWeights
from qtool.quantizers.blocks import memory_blocks
from qtool.quantizers.limits import OutputClamp

# The engine x86 takes oneDNN's kernels up to here (aten/src/ATen/native/quantized/cpu/OnednnUtils.h).
ONEDNN_MAX_GROUPS = 100


@dataclass(frozen=True)
class Geometry:
    """How a convolution moves over its input; each a list of one entry per dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def channel_highs(clamp: OutputClamp, output: Container) -> Tensor | None:
    """The largest integer of each channel behind a ReLU6 with limits of its own, uint8; None for others."""
    return None if clamp.highs is None else (clamp.highs + output.zero_point).to(torch.uint8)


class Conv(nn.Module):
    """A convolution of 1 to 3 dimensions; a ReLU is computed by its clamp.

    Args:
        weights, geometry: of the layer.
        source, output: where its input and its result lie.
        backend: the engine whose kernel it runs on.
        highs: see channel_highs.
    """

    highs: Tensor | None

    def __init__(
        self,
        weights: PackedWeights,
        geometry: Geometry,
        source: Container,
        output: Container,
        backend: str,
        highs: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.geometry = weights, geometry
        self.source, self.output, self.backend = source, output, backend
        self.register_buffer("highs", highs)
        self.dims = len(geometry.stride)
        prepack = getattr(torch.ops.quantized, f"conv{self.dims}d_prepack")
        g = geometry
        with engine(backend):
            self.packed = prepack(weights.tensor(), weights.bias, g.stride, g.padding, g.dilation, g.groups)

    def forward(self, x: Tensor) -> Tensor:
        conv = getattr(torch.ops.quantized, f"conv{self.dims}d")
        y = conv(x, self.packed, 1.0, self.output.zero_point)
        return within_channels(y, self.output, self.highs)

    @property
    def on_onednn(self) -> bool:
        """Whether it runs on oneDNN's kernel; the engine x86 hands that all but those of many groups."""
        few = self.geometry.groups <= ONEDNN_MAX_GROUPS and self.weights.symmetric
        return self.backend == "onednn" or (self.backend == "x86" and few)

    def portable(self, takes_integers: bool = False, gives_integers: bool = False) -> nn.Module:
        """The same layer in a form that says which kernel it needs; on oneDNN only. See OnednnConv."""
        at = (self.source, self.output, self.highs)
        return OnednnConv(self.weights, self.geometry, *at, takes_integers, gives_integers)


class PinnedConv(Conv):
    """A convolution whose result is right on one engine only, whichever is asked for.

    Packed weights in a file are packed again, when it is loaded, by the engine of that moment.
    """

    def __init__(
        self,
        weights: PackedWeights,
        geometry: Geometry,
        source: Container,
        output: Container,
        highs: Tensor | None = None,
    ) -> None:
        super().__init__(weights, geometry, source, output, "onednn", highs)


class Linear(nn.Module):
    """A linear layer; a ReLU is computed by its clamp."""

    highs: Tensor | None

    def __init__(
        self, weights: PackedWeights, output: Container, backend: str, highs: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weights, self.output = weights, output
        self.register_buffer("highs", highs)
        with engine(backend):
            self.packed = torch.ops.quantized.linear_prepack(weights.tensor(), weights.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.quantized.linear(x, self.packed, 1.0, self.output.zero_point)
        return within_channels(y, self.output, self.highs)


class Rescale(nn.Module):
    """A tensor on another grid, rounded once.

    Args:
        ratio: output steps per input step.
        output: where it goes.
    """

    def __init__(self, ratio: float, output: Container) -> None:
        super().__init__()
        self.ratio, self.output = ratio, output

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        # A concatenation of one: torch has no operation of its own for this.
        steps = [labelled(x, self.ratio)]
        return within(torch.ops.quantized.cat(steps, 1, 1.0, self.output.zero_point), self.output)


class Add(nn.Module):
    """The sum of two tensors.

    Args:
        ratios: output steps per step of each input.
        wide: for an input that is to be rounded onto the output's grid before it is added, where that lies.
        output: where the sum goes.
    """

    def __init__(self, ratios: Sequence[float], wide: Sequence[Container | None], output: Container) -> None:
        super().__init__()
        self.output = output
        self.first, self.second = (
            Labelled(ratio) if grid is None else Rescale(ratio, grid)
            for ratio, grid in zip(ratios, wide, strict=True)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        c = self.output
        return within(torch.ops.quantized.add(self.first(a), self.second(b), 1.0, c.zero_point), c)


class Labelled(nn.Module):
    """A tensor in steps of another, for an operation that reads both."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return labelled(x, self.ratio)


class RoundedAdd(nn.Module):
    """The sum of two tensors in the simulation's arithmetic, in float.

    Args:
        inputs: containers of the two.
        ratios: output steps per input step.
        output: where the sum goes.
        once: whether the sum is rounded, and not each of the two onto the output's grid.
    """

    def __init__(
        self, inputs: tuple[Container, ...], ratios: list[float], output: Container, once: bool = False
    ) -> None:
        super().__init__()
        self.output = output
        self.once = once
        self.why = (
            "int8 kernels multiply by other ratios, or round ties of this sum another way; added in float"
            if once
            else "int8 kernels round a sum once, the simulation rounds both inputs; added in float"
        )
        self.zero_points = [float(container.zero_point) for container in inputs]
        self.ratios = ratios

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        jit: Any = torch.jit
        # A program is to take any batch size.
        if jit.is_tracing() or a.shape != b.shape:
            return make_quantized(self._sum(a.int_repr(), b.int_repr()).int_repr(), self.output)
        total = torch.empty_like(stored(a))
        for out, part, other in memory_blocks(total, stored(a), stored(b)):
            out.copy_(stored(self._sum(part, other)))
        return make_quantized(total, self.output)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """Of unsigned integers, in the simulation's arithmetic; on a grid of scale 1."""
        total = self._in_steps(x, 0) + self._in_steps(y, 1)
        total = total.clamp_(max=self.output.high - self.output.zero_point)
        return torch.quantize_per_tensor(total, 1.0, self.output.zero_point, torch.quint8)

    def _in_steps(self, x: Tensor, index: int) -> Tensor:
        """In steps of the output, centered."""
        steps = x.float().sub_(self.zero_points[index]).mul_(self.ratios[index])
        return steps if self.once else steps.round_()


class Mul(nn.Module):
    """The product of two tensors, element by element.

    Args:
        ratio: output steps per step of the product.
        output: where it goes.
    """

    def __init__(self, ratio: float, output: Container) -> None:
        super().__init__()
        self.ratio, self.output = ratio, output

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = torch.ops.quantized.mul(labelled(a, self.ratio), b, 1.0, self.output.zero_point)
        return within(product, self.output)


class Cat(nn.Module):
    """The concatenation of tensors.

    Args:
        ratios: output steps per step of each tensor.
        output: where it goes.
    """

    def __init__(self, ratios: Sequence[float], output: Container) -> None:
        super().__init__()
        self.ratios, self.output = ratios, output

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        steps = [labelled(x, ratio) for x, ratio in zip(tensors, self.ratios, strict=True)]
        return within(torch.ops.quantized.cat(steps, dim, 1.0, self.output.zero_point), self.output)


class Pointwise(nn.Module):
    """An operation that torch computes in float and rounds once, such as hard-swish.

    Args:
        name: of the operation in torch.ops.quantized.
        source, output: where its input and its result lie.
        arguments: between the input and the output's scale.
    """

    def __init__(
        self, name: str, source: Container, output: Container, arguments: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        self.name, self.source, self.output, self.arguments = name, source, output, arguments

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        function, c = getattr(torch.ops.quantized, self.name), self.output
        y = function(labelled(x, self.source.scale), *self.arguments, c.scale, c.zero_point)
        return within(labelled(y, 1.0), c)


class Selecting(nn.Module):
    """An operation that picks some of its input's values, such as a maximum, and rounds none."""

    def __init__(self, operation: nn.Module, rescale: nn.Module) -> None:
        super().__init__()
        self.operation = operation
        self.rescale = rescale

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.rescale(self.operation(*args, **kwargs))
        return result


class Mean(nn.Module):
    """A mean over windows or dimensions, of integers in float: their sum is exact in any order in memory.

    Args:
        operation: the mean, of its first argument.
        ratio: output steps per input step.
        output: where it goes.
    """

    why = "int8 kernels would round it on the grid of their input too; integers are added up in float"

    def __init__(self, operation: nn.Module, ratio: float, output: Container) -> None:
        super().__init__()
        self.operation = operation
        self.ratio, self.output = ratio, output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return rounded(self.operation(x.dequantize(), *args, **kwargs) * self.ratio, self.output)
