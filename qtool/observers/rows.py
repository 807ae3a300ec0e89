"""A chunk of activations as rows, in whichever of two orders its memory has, and its extremes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """A chunk of activations as three axes, contiguous.

    Args:
        values: (N * S, R, C) if channels_last, else (N * S, C, R); S parts of each of N images, C channels.
        channels_last: which of the two.
        images: N.
    """

    values: Tensor
    channels_last: bool
    images: int

    def parts(self, elements: int) -> list[Tensor]:
        """The values in pieces of about so many elements, each (n, R', C) or (n, C, R) like the whole.

        An image that is larger is cut along R where its channels are last, into equal pieces if R can be.
        """
        values, whole = self.values, self.values.shape[1] * self.values.shape[2]
        if self.channels_last and whole > elements:
            r, c = values.shape[1:]
            cuts = next((k for k in range(-(-whole // elements), r // 4) if r % k == 0), 1)
            values, whole = values.view(-1, r // cuts, c), whole // cuts
        return list(torch.split(values, max(1, elements // max(1, whole))))


@dataclass(frozen=True, eq=False)
class Extremes:
    """Smallest and largest values of a chunk.

    Args:
        image_min, image_max: (N,) float32.
        channel_min, channel_max: (C,) float32.
    """

    image_min: NDArray[np.float32]
    image_max: NDArray[np.float32]
    channel_min: NDArray[np.float32]
    channel_max: NDArray[np.float32]

    @classmethod
    def of_rows(cls, low: Tensor, high: Tensor, images: int) -> Extremes:
        """Those of a chunk of images, from what rows_extremes gives, (n, C) with n a multiple of images."""
        # So few numbers that NumPy, which starts an operation sooner, is faster.
        lows, highs = low.cpu().numpy(), high.cpu().numpy()
        of_images = lows.reshape(images, -1).min(1), highs.reshape(images, -1).max(1)
        return cls(*of_images, lows.min(0), highs.max(0))

    def clamped(self, low: float, high: float) -> Extremes:
        """Those of the values after a clamp to [low, high]."""
        values = self.image_min, self.image_max, self.channel_min, self.channel_max
        return Extremes(*(v.clip(low, high) for v in values))


def as_rows(x: Tensor, images: int, batch_axis: int | None, channel_axis: int) -> Rows:
    """See a tensor as rows, without copying where its memory allows.

    Args:
        x: any shape, float32.
        images: how many are in x.
        batch_axis: the axis that holds them, an image's parts next to each other; None: there is none.
        channel_axis: the axis of channels; another one if that is batch_axis.

    Raises:
        ValueError: if x is empty.
    """
    if x.numel() == 0:
        raise ValueError(f"an empty tensor of shape {tuple(x.shape)} has no statistics")
    if batch_axis is None:
        x, batch_axis, channel_axis, images = x.unsqueeze(0), 0, channel_axis + 1, 1
    if x.dim() == 1:
        return Rows(x.reshape(images, 1, -1), False, images)
    if channel_axis >= x.dim():  # a scalar
        return Rows(x.reshape(1, 1, 1), False, 1)
    if channel_axis == batch_axis:
        channel_axis = 0 if batch_axis else 1
    last = x.movedim((batch_axis, channel_axis), (0, -1))
    parts, channels = last.shape[0], last.shape[-1]
    first = x.movedim((batch_axis, channel_axis), (0, 1))
    if last.is_contiguous() and last.dim() > 2 and not (first.is_contiguous() and first[0, 0].numel() == 1):
        return Rows(last.reshape(parts, -1, channels), True, images)
    return Rows(first.reshape(parts, channels, -1), False, images)
