"""From statistics to a range: the clipping modes none, avg, n_std, gauss and laplace.

A range comes from a record of calibration (choose_range) or from a live tensor, such as a
weight (range_of_tensor). gauss and laplace are ACIQ: Banner et al. 2019, arXiv:1810.05723,
whose published constants are in the tables below, in units of the spread, for 2 to 8 bits.
"""

from typing import Protocol

import torch
from torch import Tensor

from qtool.numerics.spec import ClipSpec, QuantSpec

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
        spec: the grid; its num_bits and symmetry matter to gauss and laplace.
        clip: the clipping mode and its settings.

    Returns:
        x_min and x_max, float32, shape (); x_min <= x_max.

    Raises:
        ValueError: if a field that the mode reads is absent, n_stds is missing or not positive,
            or the ACIQ tables have no entry for spec.num_bits.
    """
    missing = [name for name in FIELDS[clip.mode] if getattr(stats, name) is None]
    if missing:
        raise ValueError(f"clip mode {clip.mode} needs {', '.join(missing)}")
    values = {name: float(getattr(stats, name)) for name in FIELDS[clip.mode]}
    if clip.mode == "none":
        low, high = values["min"], values["max"]
    elif clip.mode == "avg":
        low, high = values["avg_min"], values["avg_max"]
    elif clip.mode == "n_std":
        low, high = _n_std_limits(values, clip.n_stds)
    else:
        spread = values[ACIQ[clip.mode][0]]
        low, high = _aciq_limits(values["mean"], spread, values["avg_min"], spec, clip)
        if clip.to_observed:
            low, high = _within_observed(low, high, stats, spec)
    # A net-aware edit can lift the lower end above what mean and std, which it leaves alone, allow.
    return torch.tensor(low), torch.tensor(max(low, high))


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
        clip: the clipping mode; per channel only `none` is possible.

    Returns:
        x_min and x_max of shape () or (C,), in x's dtype.

    Raises:
        ValueError: if x is empty, or clip is not `none` while spec.axis is set.
    """
    mode = "none" if clip is None else clip.mode
    if x.numel() == 0:
        raise ValueError("the range of an empty tensor is not defined")
    if spec.axis is not None:
        if mode != "none":
            raise ValueError(f"clip mode {mode} is per tensor, the grid is per channel")
        rows = x.movedim(spec.axis, 0).reshape(x.shape[spec.axis], -1)  # (C, rest)
        return rows.amin(dim=1), rows.amax(dim=1)
    if clip is None or mode == "none":
        return x.min(), x.max()
    num_rows = x.shape[0] if mode == "avg" and x.dim() else 1
    return choose_range(LiveStats(x, num_rows), spec, clip)


class LiveStats:
    """The fields of RangeStats, measured on one tensor; averages are over num_rows equal parts."""

    def __init__(self, x: Tensor, num_rows: int) -> None:
        rows = x.detach().reshape(num_rows, -1)
        self.min, self.max = float(x.min()), float(x.max())
        self.avg_min = float(rows.amin(dim=1).mean())
        self.avg_max = float(rows.amax(dim=1).mean())
        self.mean = float(x.mean())
        # A live tensor's std divides by N - 1, a stats file's by N (as Distiller has it).
        self.std = float(x.std()) if x.numel() > 1 else 0.0
        self.b = float((x - x.mean()).abs().mean())
