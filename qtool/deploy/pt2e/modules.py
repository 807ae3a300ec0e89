"""Modules that compute in float between the quantize and dequantize operations of torch's PT2E programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # its import defines torch.ops.quantized_decomposed
from torch.nn import functional as F

from qtool.numerics.spec import QParams, QuantSpec

assert _decomposed is not None
# A summand on the grid of the sum, whatever its size.
WIDE = torch.int16


class NotInProgram(Exception):
    """Why a layer has no form between quantize and dequantize operations, and what would work."""


def integer_type(spec: QuantSpec) -> torch.dtype:
    """The smallest type that holds a grid.

    Raises:
        NotInProgram: if it has more than 16 bits.
    """
    if spec.num_bits > 16:
        raise NotInProgram(f"a grid of {spec.num_bits} bits; 16 bits or fewer")
    if spec.num_bits > 8:
        return torch.int16 if spec.signed else torch.uint16
    return torch.int8 if spec.signed else torch.uint8


class OnGrid(nn.Module):
    """Floats to what is left of them on a grid: quantized and dequantized."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        if qparams.scale.dim() > 0:
            raise NotInProgram("activations with a grid for each channel")
        spec = qparams.spec
        self.scale, self.zero_point = float(qparams.scale), int(qparams.zero_point)
        self.limits, self.dtype = (spec.quant_min, spec.quant_max), integer_type(spec)

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.scale, self.zero_point, *self.limits, self.dtype)
        x_q = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(x_q, *grid)  # type: ignore[no-any-return]

    def integers(self, x: Tensor) -> Tensor:
        """The integers x_q of what forward has given."""
        return torch.round(x.double() / self.scale).to(torch.int64) + self.zero_point


class InSteps(OnGrid):
    """Floats rounded to steps of a grid, beyond its ends too."""

    def __init__(self, qparams: QParams) -> None:
        super().__init__(qparams)
        info = torch.iinfo(WIDE)
        self.zero_point, self.limits, self.dtype = 0, (info.min, info.max), WIDE


class Weight(nn.Module):
    """Integers, output channels first, and the floats they stand for."""

    integers: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, qparams: QParams, integers: Tensor) -> None:
        super().__init__()
        spec = qparams.spec
        self.limits, self.dtype = (spec.quant_min, spec.quant_max), integer_type(spec)
        self.register_buffer("integers", integers.to(self.dtype))
        self.register_buffer("scales", qparams.scale.float())
        self.register_buffer("zero_points", qparams.zero_point.to(torch.int64))
        self.one = (float(qparams.scale), int(qparams.zero_point)) if qparams.scale.dim() == 0 else None

    def forward(self) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.one is not None:
            return ops.dequantize_per_tensor(self.integers, *self.one, *self.limits, self.dtype)  # type: ignore[no-any-return]
        return ops.dequantize_per_channel(  # type: ignore[no-any-return]
            self.integers, self.scales, self.zero_points, 0, *self.limits, self.dtype
        )


class Activation(nn.Module):
    """A ReLU or ReLU6 that a layer has taken over, or nothing."""

    limit: Tensor | None

    def __init__(self, name: str | None, limit: Tensor | None = None) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("limit", limit)

    def forward(self, x: Tensor) -> Tensor:
        if self.limit is not None:
            return torch.minimum(F.relu(x), self.limit)
        if self.name is None:
            return x
        return F.relu(x) if self.name == "relu" else F.relu6(x)


class Weighted(nn.Module):
    """A convolution or linear layer whose weights are integers.

    Args:
        compute: of input, weight and bias.
        weight: of the layer.
        in_layout: puts weights with output channels first into the layer's own layout.
        bias: (C,), float32, or None.
        activation: behind it.
        output: its grid, or None for floats.
    """

    bias: Tensor | None

    def __init__(
        self,
        compute: Callable[..., Tensor],
        weight: Weight,
        in_layout: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        activation: Activation,
        output: OnGrid | None,
    ) -> None:
        super().__init__()
        self.compute, self.in_layout = compute, in_layout
        self.weight, self.activation, self.output = weight, activation, output
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.compute(x, self.in_layout(self.weight()), self.bias))
        return y if self.output is None else self.output(y)


class Sum(nn.Module):
    """A sum, each summand rounded first as in the simulation, or left as it is."""

    def __init__(self, rounded: Sequence[nn.Module], activation: Activation, output: OnGrid) -> None:
        super().__init__()
        self.rounded = nn.ModuleList(rounded)
        self.activation, self.output = activation, output

    def forward(self, *summands: Tensor) -> Tensor:
        parts = [each(x) for each, x in zip(self.rounded, summands, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return self.output(self.activation(total))  # type: ignore[no-any-return]


class Computed(nn.Module):
    """Any operation in float whose result goes onto a grid."""

    def __init__(self, operation: Callable[..., Tensor], activation: Activation, output: OnGrid) -> None:
        super().__init__()
        self.operation: Any = operation
        self.activation, self.output = activation, output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output(self.activation(self.operation(*args, **kwargs)))  # type: ignore[no-any-return]


class Table(nn.Module):
    """Rows of a table of integers."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight())
