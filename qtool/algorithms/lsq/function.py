"""Rounding to a grid whose step size is learned, as a function with gradients.

Reference:
    Esser et al. 2020, arXiv:1902.08153 (LSQ), sections 2.1 and 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qtool.quantizers.blocks import memory_blocks


class _Lsq(torch.autograd.Function):
    """All in one, as it is called on every activation: what backward needs is two tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any, gradient_scale: float) -> Tensor:
        to_scale, y, inside = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        for values, steps, q, passed in _parts(scale, x, to_scale, y, inside):
            torch.div(values, scale, out=steps)
            torch.clamp(steps, low, high, out=q)
            torch.eq(steps, q, out=passed)
            q.round_()
            torch.addcmul(q, steps, passed, value=-1, out=steps)
            q.mul_(scale)
        ctx.save_for_backward(inside, to_scale, scale)
        ctx.gradient_scale = gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, to_scale, scale = ctx.saved_tensors
        of_x = grads[0] * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = _summed(grads[0], to_scale, scale) * ctx.gradient_scale
        return of_x, of_scale, None, None, None


def _parts(scale: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of tensors that fit into a CPU's cache, where one scale is for all of their values."""
    alone = scale.dim() > 0 or scale.device.type != "cpu"
    return [tensors] if alone else memory_blocks(*tensors)


def _summed(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The products of two tensors of one shape, summed to the shape of a scale."""
    if scale.dim():
        return (a * b).sum_to_size(scale.shape)
    dots = [torch.dot(x.flatten(), y.flatten()) for x, y in _parts(scale, a, b)]
    return torch.stack(dots).sum()


def lsq(
    x: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor, gradient_scale: float = 1.0
) -> Tensor:
    """The values of x on a grid: clamp(x / scale, low, high), rounded, times scale.

    The gradient of x is passed through where low <= x / scale <= high and is 0 elsewhere; that of the
    scale is round(x / scale) - x / scale there, and low or high elsewhere.

    Args:
        x: any shape.
        scale: units of x per step, positive; () or a shape that broadcasts against x, such as (C, 1, 1, 1).
        low, high: the smallest and largest centered integer, numbers or as scale.
        gradient_scale: the gradient of the scale is multiplied by it, see gradient_scale.

    Example:
        >>> x = torch.tensor([0.3, 1.2, 9.0], requires_grad=True)
        >>> scale = torch.tensor(1.0, requires_grad=True)
        >>> y = lsq(x, scale, 0, 3)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist(), round(scale.grad.item(), 4)
        ([0.0, 1.0, 3.0], [1.0, 1.0, 0.0], 2.5)
    """
    result: Tensor = _Lsq.apply(x, scale, low, high, gradient_scale)
    return result


def gradient_scale(count: int, high: float) -> float:
    """What balances the step of a scale against those of what is rounded to it: 1 / sqrt(N * Q_P).

    Args:
        count: N, how many numbers there are on the grid: weights of a tensor or of a channel, or values of
            one image.
        high: Q_P, the largest integer.

    Example:
        >>> gradient_scale(100, 1)
        0.1
    """
    return 1 / math.sqrt(max(1, count) * max(1.0, high))
