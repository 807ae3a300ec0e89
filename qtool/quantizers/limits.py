"""The integers that a layer can give: those of its grid that its activation leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qtool.numerics.spec import QParams

ACTIVATION_LIMITS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def activated(x: Tensor, activation: str | None, limit: Tensor | None = None) -> Tensor:
    """Float values behind the activation that a layer computes.

    Args:
        x: (N, ...), units of the layer's output.
        activation: None, "relu" or "relu6".
        limit: of a ReLU6 whose upper end differs between channels, see LayerPlan.
    """
    low, high = ACTIVATION_LIMITS[activation]
    return x.clamp(low, high) if limit is None else torch.minimum(x.clamp(min=low), limit)


class OutputClamp(nn.Module):
    """The integers that a layer can give, its activation included.

    Args:
        output: the grid of the output.
        activation: None, "relu" or "relu6".
        limit: of a ReLU6 whose upper end differs between channels, see LayerPlan.

    Attributes:
        low, high: the smallest and largest centered integer of any channel.
        highs: the largest of each channel, in the shape of limit; None where all have the same.
    """

    highs: Tensor | None

    def __init__(self, output: QParams, activation: str | None, limit: Tensor | None = None) -> None:
        super().__init__()
        self.low, self.high = output_limits(output, activation)
        highs = None if limit is None else channel_limits(output, limit)
        if highs is not None:
            self.high = float(highs.max())
        self.register_buffer("highs", highs, persistent=False)

    def apply_(self, x: Tensor) -> Tensor:
        """Clamp centered integers in place."""
        if self.highs is None:
            return x.clamp_(self.low, self.high)
        return x.clamp_(min=self.low).clamp_(max=self.highs)


def channel_limits(output: QParams, limit: Tensor) -> Tensor:
    """The largest centered integer of each channel behind a ReLU6 that has a limit for each, float32.

    Args:
        output: the grid of the output.
        limit: units of x, any shape.

    Example:
        >>> from qtool.numerics.spec import QuantSpec
        >>> grid = QParams(torch.tensor(0.5), torch.tensor(0.0), QuantSpec(num_bits=4))
        >>> channel_limits(grid, torch.tensor([1.0, 6.0]))
        tensor([2., 7.])
    """
    largest = output.spec.quant_max - float(output.zero_point)
    steps = torch.round(limit.double() / output.scale.double())
    return steps.clamp(max=largest).float()


def output_limits(output: QParams, activation: str | None) -> tuple[float, float]:
    """The smallest and largest centered integer that a layer gives, its activation included.

    A ReLU6 ends at 6 here; OutputClamp knows those whose limit differs between channels.
    """
    zero_point, scale = float(output.zero_point), float(output.scale)
    low, high = ACTIVATION_LIMITS[activation]
    smallest = output.spec.quant_min - zero_point
    largest = output.spec.quant_max - zero_point
    if high != math.inf:
        largest = min(largest, round(high / scale))
    return float(max(smallest, low)), float(largest)
