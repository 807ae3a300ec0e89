"""Grids of activations that are trained: steps that are learned, or ranges that follow what is seen.

Reference:
    Esser et al. 2020, arXiv:1902.08153 (LSQ); Krishnamoorthi 2018, arXiv:1806.08342, section 2 and 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from qtool.algorithms.lsq.function import gradient_scale, lsq
from qtool.algorithms.simulation import Masks
from qtool.numerics.affine import qparams_from_range
from qtool.numerics.spec import QParams
from qtool.quantizers.limits import activated

# Share of a range that stays from step to step, where it follows what is seen.
DECAY = 0.99


class TrainedGrid(ABC):
    """The grid of an output, or of an input that arrives in float, per tensor.

    Args:
        qparams: at the start.
        activation: what the layer's clamp computes besides.
        limit: of a ReLU6 whose upper end differs between channels, see LayerPlan.
        device: where it is trained.
    """

    def __init__(
        self, qparams: QParams, activation: str | None, limit: Tensor | None, device: torch.device
    ) -> None:
        self.start = qparams
        self.activation = activation
        self.limit = None if limit is None else limit.to(device)
        self.device = device

    @abstractmethod
    def scale(self) -> Tensor:
        """Units per step, (); with a gradient where it is learned."""

    @abstractmethod
    def zero_point(self) -> float:
        """The integer that stands for 0.0."""

    def see(self, x: Tensor) -> None:
        """Told what is put on the grid, behind the activation, at each step of training."""
        return

    def __call__(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """The values of x behind the activation, on the grid."""
        assert masks is None, "all values go on their grids"
        x = self._active(x)
        low, high = self._limits()
        y = lsq(x, self.scale(), low, high, gradient_scale(x[0].numel(), high))
        self.see(x)
        return y

    def added(self, tensors: list[Tensor], masks: Masks | None = None) -> Tensor:
        """The sum of tensors, each brought to this grid's scale first."""
        scale = self.scale()
        balance = gradient_scale(tensors[0][0].numel(), self._limits()[1])
        total, *others = [lsq(x, scale, -math.inf, math.inf, balance) for x in tensors]
        for other in others:
            total = total + other
        return self(total)

    def moved(self) -> Tensor:
        """Its scale over that of the plan."""
        return self.scale().detach() / self.start.scale.to(self.device)

    def found(self) -> QParams:
        """The grid that it is now, on the CPU."""
        scale = self.scale().detach().cpu().clone()
        return replace(self.start, scale=scale, zero_point=torch.tensor(self.zero_point()))

    def _limits(self) -> tuple[float, float]:
        spec, zero_point = self.start.spec, self.zero_point()
        return spec.quant_min - zero_point, spec.quant_max - zero_point

    def _active(self, x: Tensor) -> Tensor:
        return x if self.activation is None else activated(x, self.activation, self.limit)


class LearnedStep(TrainedGrid):
    """A grid whose scale is learned; its zero point stays.

    Attributes:
        log_ratio: (), logarithm of the scale over the one at the start, so that a step is a share of it.
    """

    def __init__(
        self, qparams: QParams, activation: str | None, limit: Tensor | None, device: torch.device
    ) -> None:
        super().__init__(qparams, activation, limit, device)
        self.log_ratio = torch.zeros((), device=device, requires_grad=True)
        self._scale = qparams.scale.to(device)
        self._zero_point = float(qparams.zero_point)

    def scale(self) -> Tensor:
        return self._scale * self.log_ratio.exp()

    def zero_point(self) -> float:
        return self._zero_point

    def _active(self, x: Tensor) -> Tensor:
        # A ReLU in front of integers that start at 0 is what their clamp does.
        return x if self.activation == "relu" and self._limits()[0] == 0 else super()._active(x)


class MovingRange(TrainedGrid):
    """A grid whose range follows the smallest and largest value of each step, as an average that fades.

    Attributes:
        range: (2,), the smallest and largest value.
    """

    def __init__(
        self, qparams: QParams, activation: str | None, limit: Tensor | None, device: torch.device
    ) -> None:
        super().__init__(qparams, activation, limit, device)
        self.range = range_of(qparams).to(device)
        self._found = qparams

    def scale(self) -> Tensor:
        return self._found.scale.to(self.device)

    def zero_point(self) -> float:
        return float(self._found.zero_point)

    def see(self, x: Tensor) -> None:
        with torch.no_grad():
            seen = torch.stack(torch.aminmax(x))
            self.follow(DECAY * self.range + (1 - DECAY) * seen)

    def follow(self, ends: Tensor) -> None:
        """Take a range."""
        self.range = ends
        low, high = ends.cpu()
        self._found = qparams_from_range(low, high, self.start.spec)


def range_of(qparams: QParams) -> Tensor:
    """The smallest and largest value that qparams_from_range gives a per-tensor grid for, (2,).

    Example:
        >>> from qtool.numerics.spec import QuantSpec
        >>> range_of(QParams(torch.tensor(2.0), torch.tensor(0.0), QuantSpec(num_bits=4)))
        tensor([-15.,  15.])
    """
    spec, zero_point = qparams.spec, qparams.zero_point
    low, high = spec.quant_min - zero_point, spec.quant_max - zero_point
    if spec.symmetric and spec.signed:
        high = torch.tensor(spec.quant_max if spec.narrow_range else (2**spec.num_bits - 1) / 2)
        low = -high
    return torch.stack([low, high]) * qparams.scale
