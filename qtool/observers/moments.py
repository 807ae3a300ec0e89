"""An observer of one tensor: range, per-image averages, mean, and both spreads.

It sees the data twice, like Distiller: std and b are deviations from the final mean. Sums are kept
in float64, so the result does not depend on how the images were batched beyond the float32 noise
of the network itself. The averages avg_min and avg_max weight every image equally; Distiller
weights its history by elements but new data by images, so that later batches hardly count.
"""

import torch
from torch import Tensor

from qtool.observers.stats import ActivationStats

# Above this row length, reducing row by row is many times faster than torch's reduction over an axis.
LONG_ROW = 2048


class MomentsObserver:
    """Collects the fields of ActivationStats for one tensor.

    Call update for every batch, then start_second_pass, then update for every batch again, then
    stats. Axis 0 is taken as the image axis.
    """

    def __init__(self) -> None:
        self._pass = 1
        self._min, self._max = float("inf"), float("-inf")
        self._sum_min = self._sum_max = self._sum = 0.0
        self._rows = self._numel = 0
        self._single_values = True
        self._shape: tuple[int, ...] | None = None
        self._sum_squares = self._sum_abs = 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch.

        Args:
            x: floats of any shape; (N, ...), or a scalar, which counts as one image.

        Raises:
            ValueError: if x is empty or holds NaN or infinity.
        """
        if x.numel() == 0:
            raise ValueError(f"an empty tensor of shape {tuple(x.shape)} has no statistics")
        rows = x.detach().float().reshape(x.shape[0] if x.dim() else 1, -1)  # (N, elements)
        if self._pass == 1:
            self._measure_range(rows, tuple(x.shape))
        else:
            deviation = rows - self.mean
            self._sum_abs += float(deviation.abs().sum(dtype=torch.float64))
            self._sum_squares += float(deviation.square_().sum(dtype=torch.float64))

    def _measure_range(self, rows: Tensor, shape: tuple[int, ...]) -> None:
        low, high = _row_ranges(rows)
        total = float(rows.sum(dtype=torch.float64))
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError("NaN or infinity")
        self._shape = self._shape or shape
        self._min, self._max = min(self._min, float(low.min())), max(self._max, float(high.max()))
        self._sum_min += float(low.sum(dtype=torch.float64))
        self._sum_max += float(high.sum(dtype=torch.float64))
        self._sum += total
        self._rows += rows.shape[0]
        self._numel += rows.numel()
        self._single_values &= rows.shape[1] == 1

    @property
    def mean(self) -> float:
        """Mean of all elements seen in the first pass."""
        return self._sum / self._numel

    def start_second_pass(self) -> None:
        """From here on update measures deviations from the mean found so far."""
        self._pass = 2

    def stats(self) -> ActivationStats:
        """What was seen.

        Raises:
            ValueError: if nothing was.
        """
        if self._numel == 0:
            raise ValueError("no data was observed")
        # With one value an image, each image's range is a point, and their average no range at
        # all: the range over the images is the useful one.
        single = self._single_values
        return ActivationStats(
            min=self._min,
            max=self._max,
            avg_min=self._min if single else self._sum_min / self._rows,
            avg_max=self._max if single else self._sum_max / self._rows,
            mean=self.mean,
            std=(self._sum_squares / self._numel) ** 0.5,
            b=self._sum_abs / self._numel,
            shape=self._shape,
            total_numel=self._numel,
        )


def _row_ranges(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, (N,) each."""
    if rows.shape[1] < LONG_ROW:
        return torch.aminmax(rows, dim=1)
    pairs = [torch.aminmax(row) for row in rows]
    return torch.stack([low for low, _ in pairs]), torch.stack([high for _, high in pairs])
