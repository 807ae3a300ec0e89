"""From statistics to a range: the clipping modes.

A range comes from a record of calibration (choose_range) or from a live tensor, such as a
weight (range_of_tensor). none, avg, n_std, gauss and laplace are computed here, from a few moments;
estimators/ has the modes that read a histogram or the ranges of single images. gauss and laplace
are ACIQ: Banner et al. 2019, arXiv:1810.05723, whose published constants are in the tables below,
in units of the spread, for 2 to 8 bits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qtool.numerics.estimators import HISTOGRAM_ESTIMATORS, ROW_ESTIMATORS, PerImage, image_range
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import (
    HISTOGRAM_MODES,
    IMAGE_MODES,
    LIVE_CLIP_MODES,
    MOMENT_MODES,
    WEIGHT_CLIP_MODES,
    ClipSpec,
    QuantSpec,
)

LAPLACE = {0: 1.05, 1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89}
LAPLACE_HALF = {0: 1.86, 1: 2.83, 2: 3.89, 3: 5.02, 4: 6.2, 5: 7.41, 6: 8.64, 7: 9.89, 8: 11.16}
GAUSS = {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
GAUSS_HALF = {1: 1.71, 2: 2.15, 3: 2.55, 4: 2.93, 5: 3.28, 6: 3.61, 7: 3.92, 8: 4.2}

# clip mode -> (spread it scales, full-range table, half-range table)
ACIQ = {"laplace": ("b", LAPLACE, LAPLACE_HALF), "gauss": ("std", GAUSS, GAUSS_HALF)}

# The fields of a record that each mode reads.
FIELDS = {
    "none": ("min", "max"),
    "avg": ("avg_min", "avg_max"),
    "n_std": ("min", "max", "mean", "std"),
    "gauss": ("avg_min", "mean", "std"),
    "laplace": ("avg_min", "mean", "b"),
    **dict.fromkeys(HISTOGRAM_MODES, ("min", "max", "histogram")),
    **dict.fromkeys(IMAGE_MODES, ("min", "max", "image_min", "image_max")),
}


class RangeStats(Protocol):
    """The numbers that a range is chosen from; see observers.stats.ActivationStats."""

    @property
    def min(self) -> float: ...
    @property
    def max(self) -> float: ...
    @property
    def avg_min(self) -> float | None: ...
    @property
    def avg_max(self) -> float | None: ...
    @property
    def mean(self) -> float | None: ...
    @property
    def std(self) -> float | None: ...
    @property
    def b(self) -> float | None: ...
    @property
    def histogram(self) -> Histogram | None: ...
    @property
    def image_min(self) -> PerImage | None: ...
    @property
    def image_max(self) -> PerImage | None: ...


def aciq_alpha(mode: str, num_bits: int, half_range: bool = False) -> float:
    """The published clipping constant, in units of the spread.

    Raises:
        ValueError: if the tables have no entry for num_bits.

    Example:
        >>> aciq_alpha("laplace", 4), aciq_alpha("laplace", 4, half_range=True)
        (5.03, 6.2)
    """
    _, full, half = ACIQ[mode]
    table = half if half_range else full
    if num_bits not in table:
        raise ValueError(
            f"clip mode {mode} has published constants for up to {max(table)} bits, found {num_bits} bits"
        )
    return table[num_bits]


def choose_range(stats: RangeStats, spec: QuantSpec, clip: ClipSpec) -> tuple[Tensor, Tensor]:
    """The range [x_min, x_max] that a calibrated tensor is quantized to.

    Args:
        stats: what calibration measured, in units of x.
        spec: the grid; its num_bits and symmetry matter to gauss, laplace and the estimators.
        clip: the clipping mode and its settings.

    Returns:
        x_min and x_max, float32, shape (); x_min <= x_max. An estimator's are inside [min, max].

    Raises:
        ValueError: if a field that the mode reads is absent, n_stds is missing or not positive,
            or the ACIQ tables have no entry for spec.num_bits.
    """
    missing = [name for name in FIELDS[clip.mode] if getattr(stats, name) is None]
    if missing:
        wanted = ", ".join("a histogram" if name == "histogram" else name for name in missing)
        hint = "" if clip.mode in MOMENT_MODES else "; calibrate again, the file has none"
        raise ValueError(f"clip mode {clip.mode} needs {wanted}{hint}")
    if clip.mode in MOMENT_MODES:
        low, high = _from_moments(stats, spec, clip)
    else:
        low, high = _from_estimator(stats, spec, clip)
    # A net-aware edit can lift the lower end above what mean and std, which it leaves alone, allow.
    return torch.tensor(low), torch.tensor(max(low, high))


def _from_moments(stats: RangeStats, spec: QuantSpec, clip: ClipSpec) -> tuple[float, float]:
    values = {name: float(getattr(stats, name)) for name in FIELDS[clip.mode]}
    if clip.mode == "none":
        return values["min"], values["max"]
    if clip.mode == "avg":
        return values["avg_min"], values["avg_max"]
    if clip.mode == "n_std":
        return _n_std_limits(values, clip.n_stds)
    spread = values[ACIQ[clip.mode][0]]
    low, high = _aciq_limits(values["mean"], spread, values["avg_min"], spec, clip)
    return _within_observed(low, high, stats, spec) if clip.to_observed else (low, high)


def _from_estimator(stats: RangeStats, spec: QuantSpec, clip: ClipSpec) -> tuple[float, float]:
    """What an estimator finds, inside the range of the record, which a net-aware edit may have narrowed."""
    smallest = max(stats.min, 0.0) if clip.half_range else stats.min
    largest = max(stats.max, smallest)
    if stats.histogram is not None and clip.mode in HISTOGRAM_ESTIMATORS:
        histogram = stats.histogram.clamped(smallest, largest)
        low, high = HISTOGRAM_ESTIMATORS[clip.mode](histogram, spec, clip)
    else:
        assert stats.image_min is not None and stats.image_max is not None
        limits = smallest, largest
        low, high = image_range(stats.image_min.clip(*limits), stats.image_max.clip(*limits), spec, clip)
    return min(max(low, smallest), largest), min(max(high, smallest), largest)


def _n_std_limits(values: dict[str, float], n_stds: float | None) -> tuple[float, float]:
    if n_stds is None or n_stds <= 0:
        raise ValueError(f"clip mode n_std needs a positive n_stds, found {n_stds}")
    reach = n_stds * values["std"]
    return max(values["min"], values["mean"] - reach), min(values["max"], values["mean"] + reach)


def _aciq_limits(
    mean: float, spread: float, avg_min: float, spec: QuantSpec, clip: ClipSpec
) -> tuple[float, float]:
    """ACIQ's range. It is measured from its lower end and not limited by the observed maximum.

    An unsigned symmetric grid is the upper half of a signed one with one bit more, whose constants
    are those of the half range.
    """
    if spec.symmetric:
        v = abs(mean) + spread * aciq_alpha(clip.mode, spec.num_bits, half_range=not spec.signed)
        return (-v if spec.signed else 0.0), v
    alpha = spread * aciq_alpha(clip.mode, spec.num_bits, clip.half_range)
    low = max(avg_min, mean - alpha)
    return low, low + (alpha if clip.half_range else 2 * alpha)


def _within_observed(low: float, high: float, stats: RangeStats, spec: QuantSpec) -> tuple[float, float]:
    """A range without what lies beyond the smallest and largest value; symmetric if it was."""
    smallest, largest = stats.min, stats.max
    if spec.symmetric:
        largest = max(abs(smallest), abs(largest))
        smallest = -largest
    return min(max(low, smallest), largest), min(max(high, smallest), largest)


def range_of_tensor(x: Tensor, spec: QuantSpec, clip: ClipSpec | None = None) -> tuple[Tensor, Tensor]:
    """The range of a live tensor, such as a weight.

    Args:
        x: any shape; with spec.axis, one range for each index of that axis.
        spec: the grid.
        clip: one of LIVE_CLIP_MODES; or of WEIGHT_CLIP_MODES, and per channel only these.

    Returns:
        x_min and x_max of shape () or (C,); in x's dtype, unless clipped per tensor.

    Raises:
        ValueError: if x is empty, or the clip mode is not possible.
    """
    mode = "none" if clip is None else clip.mode
    if x.numel() == 0:
        raise ValueError("the range of an empty tensor is not defined")
    if mode not in (*LIVE_CLIP_MODES, *WEIGHT_CLIP_MODES):
        raise ValueError(
            f"clip mode {mode} is of calibrated tensors; choose one of {', '.join(LIVE_CLIP_MODES)}"
        )
    if spec.axis is not None:
        rows = x.movedim(spec.axis, 0).reshape(x.shape[spec.axis], -1)  # (C, rest)
        if clip is None or mode == "none":
            return rows.amin(dim=1), rows.amax(dim=1)
        if mode not in ROW_ESTIMATORS:
            raise ValueError(f"clip mode {mode} is per tensor, the grid is per channel")
        return ROW_ESTIMATORS[mode](rows, spec, clip)
    if clip is None or mode == "none":
        return x.min(), x.max()
    if mode == "l4":
        low, high = ROW_ESTIMATORS[mode](x.reshape(1, -1), spec, clip)
        return low[0], high[0]
    num_rows = x.shape[0] if mode == "avg" and x.dim() else 1
    return choose_range(LiveStats(x, num_rows), spec, clip)


class LiveStats:
    """The fields of RangeStats, measured on one tensor as asked for; averages are over num_rows parts."""

    image_min = image_max = None

    def __init__(self, x: Tensor, num_rows: int) -> None:
        self._x = x.detach()
        self._rows = self._x.reshape(num_rows, -1)

    @cached_property
    def min(self) -> float:
        return float(self._x.min())

    @cached_property
    def max(self) -> float:
        return float(self._x.max())

    @cached_property
    def avg_min(self) -> float:
        return float(self._rows.amin(dim=1).mean())

    @cached_property
    def avg_max(self) -> float:
        return float(self._rows.amax(dim=1).mean())

    @cached_property
    def mean(self) -> float:
        return float(self._x.mean())

    @cached_property
    def std(self) -> float:
        # A live tensor's std divides by N - 1, a stats file's by N (as Distiller has it).
        return float(self._x.std()) if self._x.numel() > 1 else 0.0

    @cached_property
    def b(self) -> float:
        return float((self._x - self._x.mean()).abs().mean())

    @cached_property
    def histogram(self) -> Histogram:
        return Histogram.of(self._x)
