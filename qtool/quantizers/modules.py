"""What is neither a layer with weights nor a sum: look-ups, products, and operations that stay in float."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtool.numerics.spec import QParams
from qtool.quantizers.grids import Grid, Requantize, clamp_accumulator
from qtool.quantizers.limits import OutputClamp


class QuantEmbedding(nn.Module):
    """Rows of an integer table; the output stays on the weight's grid."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


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
