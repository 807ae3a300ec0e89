"""What calibration measured: of a tensor, a layer, a network.

A record has Distiller's fields, and where qtool measured it also a histogram and the extremes of images
and channels. A field that an old file lacks is None and is asked for only when something needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qtool.errors import StatsError, nearest
from qtool.numerics.histogram import Histogram, bins_of_range
from qtool.observers.fingerprint import Fingerprint

Floats: TypeAlias = "NDArray[np.float32]"

RECALIBRATE = "run 'qtool calibrate' again"


@dataclass(frozen=True)
class ActivationStats:
    """One tensor over all calibration images, in units of the tensor.

    Args:
        min, max: over all elements.
        avg_min, avg_max: means over the images of each image's smallest and largest element.
        mean: over all elements.
        std: population standard deviation (divided by N).
        b: mean absolute deviation from the mean.
        shape: of one image's part, (1, ...); in Distiller's files of the first batch.
        total_numel: number of elements seen.
        histogram: counts of a sample of the elements.
        image_min, image_max: (images,), float32: each image's smallest and largest element.
        channel_min, channel_max: (C,), float32: each channel's.
    """

    min: float
    max: float
    avg_min: float | None = None
    avg_max: float | None = None
    mean: float | None = None
    std: float | None = None
    b: float | None = None
    shape: tuple[int, ...] | None = None
    total_numel: int | None = None
    histogram: Histogram | None = field(default=None, compare=False, repr=False)
    image_min: Floats | None = field(default=None, compare=False, repr=False)
    image_max: Floats | None = field(default=None, compare=False, repr=False)
    channel_min: Floats | None = field(default=None, compare=False, repr=False)
    channel_max: Floats | None = field(default=None, compare=False, repr=False)

    def clamped(self, low: float, high: float) -> ActivationStats:
        """The record with min, max and their averages moved into [low, high]; the rest stays."""

        def inside(value: float | None) -> float | None:
            return None if value is None else min(max(value, low), high)

        def all_inside(values: Floats | None) -> Floats | None:
            return None if values is None else np.clip(values, low, high)

        return replace(
            self,
            min=min(max(self.min, low), high),
            max=min(max(self.max, low), high),
            avg_min=inside(self.avg_min),
            avg_max=inside(self.avg_max),
            histogram=None if self.histogram is None else self.histogram.clamped(low, high),
            image_min=all_inside(self.image_min),
            image_max=all_inside(self.image_max),
            channel_min=all_inside(self.channel_min),
            channel_max=all_inside(self.channel_max),
        )

    def merge(self, other: ActivationStats) -> ActivationStats:
        """The record of the images of both, as if they had been measured together.

        All fields are exact to float64 but b: each side's is moved from its own mean to the common one
        through its histogram (see Histogram.mean_deviation_moved for the bound).

        Raises:
            ValueError: if the shapes differ, or a field is missing on one side.
        """
        if self.shape != other.shape:
            raise ValueError(f"tensors of shape {self.shape} and {other.shape} have no common statistics")
        (a, low_a, high_a), (b, low_b, high_b) = _complete(self), _complete(other)
        count = a.numel + b.numel
        mean = (a.numel * a.mean + b.numel * b.mean) / count
        variance = sum(part.numel * (part.std**2 + (part.mean - mean) ** 2) for part in (a, b)) / count
        deviation = sum(
            part.numel * part.histogram.mean_deviation_moved(part.b, part.mean, mean) for part in (a, b)
        )
        low, high = np.concatenate([low_a, low_b]), np.concatenate([high_a, high_b])
        single = count == len(low)
        smallest, largest = min(self.min, other.min), max(self.max, other.max)
        histogram = a.histogram.merge(b.histogram)
        # As wide as one calibration makes them, whose bins hold all values and not only those counted.
        exponent, _, _ = bins_of_range(smallest, largest)
        return replace(
            self,
            min=smallest,
            max=largest,
            avg_min=smallest if single else math.fsum(low) / len(low),
            avg_max=largest if single else math.fsum(high) / len(high),
            mean=mean,
            std=math.sqrt(variance),
            b=deviation / count,
            total_numel=count,
            histogram=histogram.coarsened(max(exponent, histogram.exponent)),
            image_min=low,
            image_max=high,
            channel_min=_joined(np.minimum, self.channel_min, other.channel_min),
            channel_max=_joined(np.maximum, self.channel_max, other.channel_max),
        )


@dataclass(frozen=True)
class _Moments:
    """The fields of a record that are needed to merge it."""

    numel: int
    mean: float
    std: float
    b: float
    histogram: Histogram


def _complete(record: ActivationStats) -> tuple[_Moments, Floats, Floats]:
    needed = ("total_numel", "mean", "std", "b", "histogram", "image_min", "image_max")
    missing = [name for name in needed if getattr(record, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: missing, so that it cannot be merged")
    assert record.total_numel is not None and record.mean is not None and record.std is not None
    assert record.b is not None and record.histogram is not None
    assert record.image_min is not None and record.image_max is not None
    moments = _Moments(record.total_numel, record.mean, record.std, record.b, record.histogram)
    return moments, record.image_min, record.image_max


def _joined(ufunc: Callable[[Floats, Floats], Floats], a: Floats | None, b: Floats | None) -> Floats | None:
    return None if a is None or b is None or a.shape != b.shape else ufunc(a, b)


@dataclass(frozen=True)
class LayerStats:
    """The tensors that a layer reads, by position, and the one that it gives."""

    inputs: Mapping[int, ActivationStats] = field(default_factory=dict)
    output: ActivationStats | None = None


@dataclass(frozen=True)
class ModelStats:
    """Statistics of a whole network.

    Args:
        layers: by layer name, in the order of execution.
        source: where they came from, for messages: a file name, or "this calibration".
        fingerprint: of what they were measured on, None where that is not known.
    """

    layers: Mapping[str, LayerStats]
    source: str = "this calibration"
    fingerprint: Fingerprint | None = None

    def output(self, name: str) -> ActivationStats:
        """The record of a layer's output.

        Raises:
            StatsError: if there is none, with the nearest names.
        """
        record = self._layer(name).output
        if record is None:
            raise StatsError(
                f"{self.source}: layer {name!r} has no record of its output; {RECALIBRATE} "
                "(the output of a layer with a folded batch norm is that of the batch norm)"
            )
        return record

    def input(self, name: str, index: int) -> ActivationStats:
        """The record of a layer's input number index.

        Raises:
            StatsError: if there is none.
        """
        inputs = self._layer(name).inputs
        if index not in inputs:
            raise StatsError(
                f"{self.source}: layer {name!r} has no record of its input {index}; {RECALIBRATE}"
            )
        return inputs[index]

    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one batch of network inputs: that of the first layer's input 0."""
        for layer in self.layers.values():
            return layer.inputs[0].shape if 0 in layer.inputs else None
        return None

    def _layer(self, name: str) -> LayerStats:
        if name not in self.layers:
            raise StatsError(
                f"{self.source}: no entry for {name!r}{nearest(name, self.layers)}; "
                "the file must be of the same network, measured with 'qtool calibrate'"
            )
        return self.layers[name]


def records(stats: ModelStats) -> Iterator[tuple[str, ActivationStats]]:
    """Every record with its place: "conv1.inputs.0", "conv1.output"."""
    for name, layer in stats.layers.items():
        for index, record in layer.inputs.items():
            yield f"{name}.inputs.{index}", record
        if layer.output is not None:
            yield f"{name}.output", layer.output
