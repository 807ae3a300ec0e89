"""Output grids with gradients: rounding is passed straight through, and the scale can be learned.

Reference:
    Esser et al. 2020, arXiv:1902.08153 (LSQ); Wei et al. 2022, arXiv:2203.05740 (QDrop).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from qtool.algorithms.simulation import Masks
from qtool.numerics.spec import QParams
from qtool.quantizers.limits import activated

# A pool of random numbers that masks are cut from, as drawing each anew would take longer than a convolution.
POOL = 2**22


class _OnGrid(torch.autograd.Function):
    """round(x / scale) within limits, times scale; x itself where a mask is 0.

    All in one, as it is called on every activation: what backward needs is two tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, mask: Tensor | None) -> Tensor:
        steps = x / scale
        rounded = steps.round()
        q = rounded.clamp(low, high)
        inside = (rounded == q).to(x.dtype)
        to_scale = q - steps.mul_(inside) if ctx.needs_input_grad[1] else None
        y = q.mul_(scale)
        if mask is not None:
            y.sub_(x).mul_(mask).add_(x)
            inside.sub_(1).mul_(mask).add_(1)
            to_scale = None if to_scale is None else to_scale.mul_(mask)
        ctx.save_for_backward(inside, to_scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, to_scale = ctx.saved_tensors
        of_scale = None if to_scale is None else torch.dot(grads[0].flatten(), to_scale.flatten())
        return grads[0] * inside, of_scale, None, None, None


class LearnedGrid:
    """A grid whose scale is learned; its zero point stays.

    Args:
        qparams: per tensor.
        activation: what the layer's clamp computes besides.
        learn: whether the scale may change.
        limit: of a ReLU6 whose upper end differs between channels, see LayerPlan.

    Attributes:
        log_ratio: (), logarithm of the scale over the one at the start, so that a step is a share of it.
    """

    def __init__(
        self, qparams: QParams, activation: str | None, learn: bool, limit: Tensor | None = None
    ) -> None:
        self.qparams = qparams
        self.activation, self.limit = activation, limit
        zero_point = float(qparams.zero_point)
        self.low, self.high = qparams.spec.quant_min - zero_point, qparams.spec.quant_max - zero_point
        self.log_ratio = torch.zeros((), requires_grad=learn)

    @property
    def scale(self) -> Tensor:
        """Units per step, ()."""
        return self.qparams.scale * self.log_ratio.exp()

    def __call__(self, x: Tensor, masks: Masks | None = None) -> Tensor:
        """The values of x behind the activation, on the grid, or where the mask says so off it."""
        x = self._active(x)
        mask = None if masks is None else masks(x.shape)
        return on_grid(x, self.scale, self.low, self.high, mask)

    def added(self, tensors: list[Tensor], masks: Masks | None = None) -> Tensor:
        """The sum of tensors, each brought to this grid's scale first."""
        scale, mask = self.scale, None if masks is None else masks(tensors[0].shape)
        total, *others = [on_grid(x, scale, -math.inf, math.inf, mask) for x in tensors]
        for other in others:
            total = total + other
        return on_grid(self._active(total), scale, self.low, self.high, mask)

    def moved(self) -> Tensor:
        """Its scale over the one at the start."""
        return self.log_ratio.detach().exp()

    def found(self) -> QParams:
        """The grid with the scale that was learned."""
        return replace(self.qparams, scale=self.scale.detach().clone())

    def _active(self, x: Tensor) -> Tensor:
        return x if self.activation is None else activated(x, self.activation, self.limit)


def on_grid(x: Tensor, scale: Tensor, low: float, high: float, mask: Tensor | None = None) -> Tensor:
    """The values of x on a grid, with the gradients of LSQ.

    Args:
        x: any shape.
        scale: (), units per step.
        low, high: the smallest and largest centered integer.
        mask: of x's shape, 1.0 where it goes on the grid and 0.0 where it stays as it is; None for 1.0.
    """
    result: Tensor = _OnGrid.apply(x, scale, low, high, mask)
    return result


class RandomMasks:
    """Masks that are 1.0 with a probability, element by element.

    Args:
        probability: of 1.0.
        generator: of the pool, and of where each mask starts in it.
        pool: how many numbers are drawn; masks larger than that repeat them.
    """

    def __init__(self, probability: float, generator: torch.Generator, pool: int = POOL) -> None:
        self._generator = generator
        self._pool = (torch.rand(pool, generator=generator) < probability).float()

    def __call__(self, shape: Size) -> Tensor:
        count = math.prod(shape)
        if count >= len(self._pool):
            self._pool = self._pool.repeat(count // len(self._pool) + 2)
        start = int(torch.randint(len(self._pool) - count, (), generator=self._generator))
        return self._pool[start : start + count].view(shape)
