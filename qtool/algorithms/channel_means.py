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
        self._sums[x.shape[1:]] = before + x.sum(0, dtype=torch.float64), count + len(x)

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
        compute: the layer as a function of input and weight, see quantizers.modules.weighted_function.
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
        self._mean: Tensor = torch.zeros((), dtype=torch.float64)
        self._squares: Tensor = torch.zeros((), dtype=torch.float64)

    def add(self, y: Tensor) -> None:
        """Count a batch of outputs."""
        rows = y.movedim(self._axis, 0).flatten(1)  # (C, elements)
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        count, off = rows.shape[1], mean.double() - self._mean
        both = self._count + count
        # Chan et al. 1983: squares about a common mean, however the elements came in batches.
        self._squares = self._squares + variance.double() * count + off**2 * (self._count * count / both)
        self._mean = self._mean + off * (count / both)
        self._count = both

    @property
    def std(self) -> Tensor:
        """(C,), float64."""
        return (self._squares / self._count).sqrt()
