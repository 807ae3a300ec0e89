"""A layer's weight grid in the layout of rows: scale and limits of each output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.algorithms.rounding.rows import grouped
from qtool.numerics.affine import along_axis, centered_limits
from qtool.numerics.spec import QParams
from qtool.quantizers.weights import integer_dtype


@dataclass(frozen=True)
class RowGrid:
    """The centered integers q - zero_point that a weight can take, and what one step is worth.

    Args:
        scale: (G, C_out / G, 1), float64.
        low, high: the smallest and largest centered integer; same shape.
    """

    scale: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, weight: QParams, channels: int, groups: int) -> RowGrid:
        """The grid of a weight with so many output channels."""
        low, high = centered_limits(weight, 1)
        rows = [grouped(t.double().expand(channels), groups) for t in (weight.scale, low, high)]
        return cls(*rows)

    def nearest(self, values: Tensor) -> Tensor:
        """The centered integers nearest to values in units of the weight, (G, R, K)."""
        return torch.round(values / self.scale).clamp(self.low, self.high)


def centered_rows(weight: QParams, weight_q: Tensor, groups: int) -> Tensor:
    """The centered integers of a weight as matrices, (G, R, K), float64."""
    zero_point = along_axis(weight.zero_point, weight.spec.axis, weight_q.dim())
    return grouped(weight_q.double() - zero_point.double(), groups)


def integers_of_rows(weight: QParams, centered: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of centered_rows, in the smallest dtype that holds the grid."""
    zero_point = along_axis(weight.zero_point, weight.spec.axis, len(shape))
    return (centered.reshape(shape) + zero_point.double()).to(integer_dtype(weight.spec))
