"""The observer of one tensor: every statistic of it, in one pass over the images.

Range, averages of the images' ranges, mean and standard deviation are of all elements. The histogram and
b, the mean absolute deviation, are of a sample: elements in blocks spread evenly over the tensor and its
channels, at another offset for every few images; tensors with up to SAMPLE elements an image are taken
whole. Deviations are measured from a pivot, the mean of the first
image, and moved to the final mean at the end: exactly for std, through the histogram for b.

A chunk's part in each statistic depends on the chunk alone, so the images can come in any batches, and
the chunks from any process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.numerics.histogram import MAX_BINS, Histogram, bins_of_range
from qtool.observers.moments import Moments, measure
from qtool.observers.rows import Extremes, Rows
from qtool.observers.scan import absolute_deviation, compiled, count, row_length
from qtool.observers.sums import TensorSums

# Elements of each image that are sampled, at least, and how many of them lie side by side.
SAMPLE = 4096
BLOCK = 16
# Images of which the same elements are sampled; the next ones give others.
TURN = 16
# Sampled elements that wait to be counted together.
WAITING = 1 << 16


class NotFinite(ValueError):
    """A tensor holds NaN or infinity; image is the number of the first image where it does."""

    def __init__(self, image: int) -> None:
        super().__init__("NaN or infinity")
        self.image = image


@dataclass(frozen=True)
class Chunk:
    """The few images that are going through the network together.

    Args:
        number: of the chunk, from 0.
        first: number of its first image.
        images: how many there are.
    """

    number: int
    first: int
    images: int


@dataclass(frozen=True)
class Clamp:
    """An activation function that only cuts off, and the observer of what it gives.

    Args:
        low, high: its limits.
        observer: takes in what is left.
    """

    low: float
    high: float
    observer: TensorObserver


@dataclass
class TensorObserver:
    """Gathers the sums of one tensor, chunk by chunk.

    Args:
        shape: of one image's part, for the record.
        pivot: where deviations are measured from; None takes the mean of the first chunk to come.
        latest: number and extremes of the chunk that came last.
    """

    shape: tuple[int, ...]
    pivot: float | None = None
    latest: tuple[int, Extremes] | None = None
    _numel: int = 0
    _images: list[tuple[int, list[float], list[float]]] = field(default_factory=list)
    _channel_min: NDArray[np.float32] | None = None
    _channel_max: NDArray[np.float32] | None = None
    _chunks: list[tuple[int, list[float]]] = field(default_factory=list)
    _counts: RunningHistogram = field(default_factory=lambda: RunningHistogram())

    def update(
        self, rows: Rows, chunk: Chunk, known: Extremes | None = None, clamp: Clamp | None = None
    ) -> None:
        """Take in a chunk.

        Args:
            rows: its values, float32; those of each image, or a single row of a tensor without images.
            chunk: which images these are.
            known: the extremes, where they follow from those of another tensor.
            clamp: written over the values once they are taken in, and observed too.

        Raises:
            NotFinite: if it holds NaN or infinity.
        """
        sample = _sample(rows, chunk.first // TURN)
        limits = None if clamp is None else (clamp.low, clamp.high)
        found = measure(rows, extremes=known is None, limits=limits)
        whole = known or found.extremes
        assert whole is not None
        if not math.isfinite(found.moments.squares):
            _refuse_infinite(whole, chunk.first)
        self._take_in(rows, chunk, whole, found.moments, sample)
        if clamp is not None and limits is not None and found.clamped is not None:
            clamped = sample.clamp(*limits)
            clamp.observer._take_in(rows, chunk, whole.clamped(*limits), found.clamped, clamped)

    def _take_in(
        self,
        rows: Rows,
        chunk: Chunk,
        whole: Extremes,
        moments: Moments,
        sample: Tensor,
    ) -> None:
        self._numel += moments.count
        if self.pivot is None:
            self.pivot = moments.mean
        absolute = compiled(absolute_deviation)(sample, self.pivot, row_length(len(sample)))
        sums = np.array([*moments.about(self.pivot), absolute])
        self._note_images(chunk.number, self._first_of(rows, chunk), whole, sums)
        self._note_channels(whole)
        self.latest = (chunk.number, whole)
        self._counts.update(sample, whole)

    @staticmethod
    def _first_of(rows: Rows, chunk: Chunk) -> int:
        """The number of the first image; of the chunk, where images are not told apart."""
        return chunk.first if rows.images == chunk.images else chunk.number

    def _note_images(self, number: int, first: int, found: Extremes, sums: NDArray[np.float64]) -> None:
        low, high = found.image_min, found.image_max
        if self._chunks and self._chunks[-1][0] == number:  # the layer was called again, as in a loop
            _, earlier_low, earlier_high = self._images.pop()
            low, high = np.minimum(low, earlier_low), np.maximum(high, earlier_high)
            sums = sums + self._chunks.pop()[1]
        # Not as arrays: small ones that stay, among large ones that come and go, would break up the memory.
        self._images.append((first, low.tolist(), high.tolist()))
        self._chunks.append((number, sums.tolist()))

    def _note_channels(self, found: Extremes) -> None:
        low, high = found.channel_min, found.channel_max
        if self._channel_min is None or self._channel_max is None:
            self._channel_min, self._channel_max = low.copy(), high.copy()
            return
        if len(low) != len(self._channel_min):  # sequences of several lengths: these are no channels
            low, high = low.min(keepdims=True), high.max(keepdims=True)
            self._channel_min = self._channel_min.min(keepdims=True)
            self._channel_max = self._channel_max.max(keepdims=True)
        np.minimum(self._channel_min, low, out=self._channel_min)
        np.maximum(self._channel_max, high, out=self._channel_max)

    def sums(self) -> TensorSums | None:
        """What has come so far, or None if nothing has."""
        if self.pivot is None or self._channel_min is None or self._channel_max is None:
            return None
        deviation, squares, absolute = np.array([sums for _, sums in self._chunks]).T
        return TensorSums(
            shape=self.shape,
            numel=self._numel,
            images=np.concatenate([first + np.arange(len(low)) for first, low, _ in self._images]),
            image_min=np.concatenate([np.array(low, np.float32) for _, low, _ in self._images]),
            image_max=np.concatenate([np.array(high, np.float32) for _, _, high in self._images]),
            channel_min=self._channel_min,
            channel_max=self._channel_max,
            pivot=self.pivot,
            chunks=np.array([number for number, _ in self._chunks]),
            deviation=deviation,
            squares=squares,
            absolute=absolute,
            histogram=self._counts.histogram(),
        )


class RunningHistogram:
    """A histogram that grows in place; its bins are wide enough for all elements, counted or not."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._exponent, self._first = 0, 0
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor, found: Extremes) -> None:
        """Count the values of x, (K,), a part of a chunk with the extremes found."""
        low, high = float(found.channel_min.min()), float(found.channel_max.max())
        if low < self._low or high > self._high:
            self._count()
            self._widen(low, high)
        self._waiting.append(x)
        if sum(map(len, self._waiting)) >= WAITING:
            self._count()

    def _count(self) -> None:
        if not self._waiting:
            return
        compiled(count)(self._counts, self._waiting, math.ldexp(1.0, -self._exponent), self._first)
        self._waiting.clear()

    def _widen(self, low: float, high: float) -> None:
        before = self.histogram() if len(self._counts) else None
        self._low, self._high = min(low, self._low), max(high, self._high)
        self._exponent, self._first, last = bins_of_range(self._low, self._high)
        self._counts = torch.zeros(min(last - self._first + 1, MAX_BINS), dtype=torch.int64)
        if before is not None and before.total:
            old = before.coarsened(self._exponent)
            start = old.first - self._first
            self._counts[start : start + len(old.counts)] = torch.from_numpy(old.counts)

    def histogram(self) -> Histogram:
        """The counts so far, without empty bins at the ends."""
        self._count()
        counts = self._counts.numpy()
        filled = np.flatnonzero(counts)
        first, last = int(filled[0]), int(filled[-1])
        return Histogram(self._exponent, self._first + first, counts[first : last + 1].copy())


def _sample(rows: Rows, turn: int) -> Tensor:
    """The elements of a chunk that are sampled, (samples,), in memory of their own.

    Args:
        rows: the chunk.
        turn: how many times TURN images came before it.
    """
    x = rows.values.reshape(rows.images, -1)  # (N, K)
    if x.shape[1] <= SAMPLE:
        return x.flatten().to("cpu", copy=True)
    blocks = x.shape[1] // BLOCK
    stride, side = blocks * BLOCK // SAMPLE, rows.values.shape[2]
    # With a divisor in common, only some of the channels that lie side by side would ever be met.
    while side % BLOCK == 0 and math.gcd(stride, side // BLOCK) > 1:
        stride -= 1
    whole = x[:, : blocks * BLOCK].view(len(x), blocks, BLOCK)
    # An odd step through the offsets meets each of them before any comes again, if stride is a power of 2.
    offsets = [(turn + k) * 7919 % stride for k in range(-(-len(x) // TURN))]
    turns = zip(torch.split(whole, TURN), offsets, strict=True)
    sampled = [images[:, offset::stride][:, : blocks // stride].reshape(-1) for images, offset in turns]
    return torch.cat(sampled).cpu()


def _refuse_infinite(found: Extremes, first: int) -> None:
    finite = np.isfinite(found.image_min) & np.isfinite(found.image_max)
    if not finite.all():
        raise NotFinite(first + int(np.flatnonzero(~finite)[0]))
