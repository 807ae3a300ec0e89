"""Which integers of a grid are used, counted batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.numerics.spec import QParams


@dataclass(frozen=True)
class CodeUse:
    """How a layer's output uses its grid.

    Args:
        saturated: share of the float values beyond what the layer can give, 0 to 1.
        levels: integers of the grid.
        dead: those that no value can be, such as the negative ones behind a ReLU.
        unused: those that no value was, though it could.
        used_range: from the smallest to the largest integer that was, as a share of those that can be.
    """

    saturated: float
    levels: int
    dead: int
    unused: int
    used_range: float


class CodeCounts:
    """Counts the integers of one per-tensor grid; sums of batches are those of all.

    Args:
        grid: of the values.
        low, high: the smallest and largest centered integer that the layer gives.
    """

    def __init__(self, grid: QParams, low: float, high: float) -> None:
        self.grid, self.low, self.high = grid, low, high
        self.zero_point = float(grid.zero_point)
        self.counts = torch.zeros(grid.spec.quant_max - grid.spec.quant_min + 1, dtype=torch.int64)
        self.values = self.beyond = 0

    def add(self, x: Tensor, x_centered: Tensor) -> None:
        """Add a batch.

        Args:
            x: the float network's values.
            x_centered: centered integers of the quantized network, any shape.
        """
        codes = (x_centered.flatten() + (self.zero_point - self.grid.spec.quant_min)).long()
        self.counts += torch.bincount(codes, minlength=len(self.counts))
        steps = torch.round(x / self.grid.scale)
        self.values += x.numel()
        self.beyond += int(((steps < self.low) | (steps > self.high)).sum())

    def use(self) -> CodeUse:
        """What was found.

        Raises:
            ValueError: if nothing was added.
        """
        if not self.values:
            raise ValueError("no values")
        first = round(self.low + self.zero_point) - self.grid.spec.quant_min
        last = round(self.high + self.zero_point) - self.grid.spec.quant_min
        reachable = self.counts[first : last + 1]
        (taken,) = torch.nonzero(reachable, as_tuple=True)
        return CodeUse(
            saturated=self.beyond / self.values,
            levels=len(self.counts),
            dead=len(self.counts) - len(reachable),
            unused=len(reachable) - len(taken),
            used_range=int(taken[-1] - taken[0] + 1) / len(reachable),
        )
