"""Means over many images: of what a layer reads, and of what it gives, by output channel.

A convolution is linear, so the mean of its outputs is what it gives for the mean of its inputs, the borders
of the image included. One image, the mean of all, therefore says what a change of the weights does to the
mean output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Compute = Callable[[Tensor, Tensor], Tensor]


class MeanInput:
    """The mean of what a convolution or linear layer reads; one for each size of image.

    Args:
        module: the layer.

    Attributes:
        images: (mean, weight) pairs: what to give the layer in place of all images, (1, C, ...) or
            (1, C_in), float64, and how many images, or rows of a linear layer, that stands for.
    """

    def __init__(self, module: nn.Module) -> None:
        self._rows = isinstance(module, nn.Linear)
        self._dims = module.weight.dim()  # type: ignore[operator]
        self._sums: dict[torch.Size, tuple[Tensor, int]] = {}

    def add(self, x: Tensor) -> None:
        """Count a batch: (N, C, ...) or, for a linear layer, (..., C_in)."""
        if self._rows:
            x = x.flatten(0, -2) if x.dim() > 1 else x[None]
        elif x.dim() < self._dims:
            x = x[None]  # an image without a batch axis
        before, count = self._sums.get(x.shape[1:], (0.0, 0))
        # Sums of few images in float32, as adding them up in float64 would cost more than the layer.
        self._sums[x.shape[1:]] = before + x.sum(0).double(), count + len(x)

    @classmethod
    def of(cls, module: nn.Module, batches: Iterable[Tensor]) -> MeanInput:
        """The mean of batches."""
        found = cls(module)
        for x in batches:
            found.add(x)
        return found

    @property
    def images(self) -> list[tuple[Tensor, int]]:
        """What stands for all images."""
        return [((total / count)[None], count) for total, count in self._sums.values()]


def mean_output(inputs: MeanInput, compute: Compute, weight: Tensor) -> Tensor:
    """The mean of a layer's output, without its bias, over images and positions.

    Args:
        inputs: the mean of what it reads.
        compute: the layer as a function of input and weight, see quantizers.weighted.weighted_function.
        weight: in the layer's layout.

    Returns:
        (C_out,), float64.
    """
    total, elements = torch.zeros((), dtype=torch.float64), 0
    for x, count in inputs.images:
        y = compute(x, weight.detach().double())[0]
        y = y.reshape(len(y), -1)  # (C_out, positions)
        total = total + y.sum(1) * count
        elements += y.shape[1] * count
    return total / elements


class Spread:
    """The standard deviation of a layer's output by channel, over images and positions.

    Args:
        channel_axis: of the output.
    """

    def __init__(self, channel_axis: int) -> None:
        self._axis = channel_axis
        self._count = 0
        self._sum: Tensor = torch.zeros((), dtype=torch.float64)
        self._squares: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, y: Tensor) -> None:
        """Count a batch of outputs."""
        rows = y.movedim(self._axis, 1) if y.dim() > 1 else y[None]
        rows = rows.reshape(*rows.shape[:2], -1)  # (N, C, elements)
        self._count += rows.shape[0] * rows.shape[2]
        self._sum = self._sum + rows.sum(2).double().sum(0)
        self._squares = self._squares + torch.linalg.vector_norm(rows, dim=2).double().square().sum(0)

    @property
    def std(self) -> Tensor:
        """(C,), float64; off by some 1e-4 of the mean where that is all there is."""
        mean = self._sum / self._count
        return (self._squares / self._count - mean**2).clamp(min=0).sqrt()
