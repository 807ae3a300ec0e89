"""What one tensor's observer has gathered: sums that add up to the same whatever the split.

Everything is kept by image or by chunk (the few images that went through the network together) and is
added up in the order of their numbers, so that several processes give the bytes of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.numerics.histogram import Histogram, bins_of_range
from qtool.observers.stats import ActivationStats


@dataclass(frozen=True, eq=False)
class TensorSums:
    """Sums over the elements of one tensor.

    Args:
        shape: of one image's part, in the first chunk; a leading 1 stands for the images.
        numel: elements seen.
        images: (n,) int64, numbers of the images; of the chunks where the tensor has no batch axis.
        image_min, image_max: (n,) float32, units of x.
        channel_min, channel_max: (C,) float32, units of x.
        pivot: the value from which deviations are measured, units of x; the same in all parts.
        chunks: (k,) int64, numbers of the chunks.
        deviation: (k,) float64, sum of x - pivot.
        squares: (k,) float64, sum of (x - pivot)^2.
        absolute: (k,) float64, sum of |x - pivot| over the sampled elements.
        histogram: of the sampled elements.
    """

    shape: tuple[int, ...]
    numel: int
    images: NDArray[np.int64]
    image_min: NDArray[np.float32]
    image_max: NDArray[np.float32]
    channel_min: NDArray[np.float32]
    channel_max: NDArray[np.float32]
    pivot: float
    chunks: NDArray[np.int64]
    deviation: NDArray[np.float64]
    squares: NDArray[np.float64]
    absolute: NDArray[np.float64]
    histogram: Histogram

    def merge(self, other: TensorSums) -> TensorSums:
        """The sums over the elements of both, which have the same pivot and no image in common.

        Sequences may differ in length, and then have no channels.

        Raises:
            ValueError: if the pivots, or the numbers of dimensions of an image, differ.
        """
        if self.pivot != other.pivot or len(self.shape) != len(other.shape):
            raise ValueError(
                f"sums about {self.pivot:g} of shape {self.shape} and about {other.pivot:g} "
                f"of shape {other.shape} are not of one tensor"
            )
        images = np.concatenate([self.images, other.images])
        order = np.argsort(images, kind="stable")
        chunks = np.concatenate([self.chunks, other.chunks])
        chunk_order = np.argsort(chunks, kind="stable")

        def joined(name: str, order: NDArray[np.int64]) -> NDArray[Any]:
            values = np.concatenate([getattr(self, name), getattr(other, name)])
            return np.asarray(values[order])

        lows, highs = (self.channel_min, other.channel_min), (self.channel_max, other.channel_max)
        if len(self.channel_min) != len(other.channel_min):
            lows = (lows[0].min(keepdims=True), lows[1].min(keepdims=True))
            highs = (highs[0].max(keepdims=True), highs[1].max(keepdims=True))
        return replace(
            self,
            shape=self.shape if self.chunks.min() < other.chunks.min() else other.shape,
            numel=self.numel + other.numel,
            images=images[order],
            image_min=joined("image_min", order),
            image_max=joined("image_max", order),
            channel_min=np.minimum(*lows),
            channel_max=np.maximum(*highs),
            chunks=chunks[chunk_order],
            deviation=joined("deviation", chunk_order),
            squares=joined("squares", chunk_order),
            absolute=joined("absolute", chunk_order),
            histogram=self.histogram.merge(other.histogram),
        )

    def stats(self, group: int = 1) -> ActivationStats:
        """The record of this tensor.

        Args:
            group: how many images make one item of avg_min and avg_max; 1 is an image's own range.
        """
        low, high = float(self.image_min.min()), float(self.image_max.max())
        exponent, _, _ = bins_of_range(low, high)
        histogram = self.histogram.coarsened(max(exponent, self.histogram.exponent))
        deviation = math.fsum(self.deviation) / self.numel
        b_at_pivot = math.fsum(self.absolute) / histogram.total
        mean = min(max(self.pivot + deviation, low), high)
        variance = math.fsum(self.squares) / self.numel - deviation**2
        b = histogram.mean_deviation_moved(b_at_pivot, self.pivot, mean)
        std = math.sqrt(max(variance, 0.0))
        items_min, items_max = self._items(group)
        # With one value an image, each image's range is a point, and their average no range at
        # all: the range over the images is the useful one.
        single = self.numel == len(self.images)
        return ActivationStats(
            min=low,
            max=high,
            avg_min=low if single else math.fsum(items_min) / len(items_min),
            avg_max=high if single else math.fsum(items_max) / len(items_max),
            mean=mean,
            std=std,
            b=min(max(b, 0.0), std),
            shape=self.shape,
            total_numel=self.numel,
            histogram=histogram,
            image_min=items_min,
            image_max=items_max,
            channel_min=self.channel_min,
            channel_max=self.channel_max,
        )

    def _items(self, group: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if group == 1:
            return self.image_min, self.image_max
        starts = np.flatnonzero(np.diff(self.images // group, prepend=-1))
        return np.minimum.reduceat(self.image_min, starts), np.maximum.reduceat(self.image_max, starts)
