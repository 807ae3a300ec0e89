"""Ranges of many channels at once, from their values: the estimators for weights per channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from qtool.numerics.estimators.mse import grid_over, search
from qtool.numerics.histogram import Floats
from qtool.numerics.spec import ClipSpec, QuantSpec

# As in mse.OF_HISTOGRAM; fewer, as each candidate costs a pass through the values.
OF_ROWS = ((3.0, 1 / 4), (1 / 4, 1 / 8), (1 / 16, 1 / 16), (1 / 32, 1 / 32))
# Values that are searched together: they, and what is computed of them, stay in the cache.
CHUNK = 1 << 16


def mse_of_rows(rows: Tensor, spec: QuantSpec, _clip: ClipSpec) -> tuple[Tensor, Tensor]:
    """For each channel, the range whose grid makes the smallest squared error.

    Args:
        rows: (C, K), K the values of a channel.
        spec: the grid of each channel.

    Returns:
        low and high, (C,), around zero.
    """
    return _smallest_error(rows, spec, Tensor.square_)


def l4_of_rows(rows: Tensor, spec: QuantSpec, _clip: ClipSpec) -> tuple[Tensor, Tensor]:
    """For each channel, the range whose grid makes the smallest sum of fourth powers of errors.

    A range that cuts weights off makes them all too small, and so does the layer's output; the error of
    rounding has no such direction, and means nothing next to it. The squared error weighs both alike.

    Args:
        rows: (C, K), K the values of a channel.
        spec: the grid of each channel.

    Returns:
        low and high, (C,), around zero.

    Reference:
        L_p norms of the error: Nahshan et al. 2019, arXiv:1911.07190, section 4.
    """
    # Of numbers around 1, as powers of small ones are nothing in float32.
    largest = rows.detach().abs().amax(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
    low, high = _smallest_error(rows / largest[:, None], spec, lambda x: x.square_().square_())
    return low * largest, high * largest


def _smallest_error(
    rows: Tensor, spec: QuantSpec, power: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """For each channel, the range whose grid makes the smallest sum of powers of errors, taken in place."""
    parts = torch.split(rows, max(1, CHUNK // rows.shape[1]))
    found = [_smallest_error_of_chunk(part, spec, power) for part in parts]
    low, high = (torch.cat(ends).to(rows.dtype) for ends in zip(*found, strict=True))
    return low, high


def _smallest_error_of_chunk(
    rows: Tensor, spec: QuantSpec, power: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    x = rows.detach().float().cpu()
    rounded = torch.empty_like(x)

    def error_of(low: Floats, high: Floats) -> Floats:
        scale, smallest, largest = (torch.from_numpy(v).float()[:, None] for v in grid_over(low, high, spec))
        torch.div(x, scale, out=rounded)
        rounded.round_().clamp_(smallest, largest).mul_(scale).sub_(x)
        return np.asarray(power(rounded).sum(dim=1, dtype=torch.float64).numpy())

    def error(low: Floats, high: Floats) -> Floats:
        return np.stack([error_of(a, b) for a, b in zip(low, high, strict=True)])

    low, high = x.amin(dim=1).clamp(max=0), x.amax(dim=1).clamp(min=0)
    found = search(error, low.double().numpy(), high.double().numpy(), spec.symmetric, OF_ROWS)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def percentile_of_rows(rows: Tensor, spec: QuantSpec, clip: ClipSpec) -> tuple[Tensor, Tensor]:
    """For each channel, the range that holds clip.percentile percent of its values.

    Between two values, it is interpolated; see quantiles.percentile_range for the two kinds of grids.

    Args:
        rows: (C, K), K the values of a channel.

    Returns:
        low and high, (C,).
    """
    x = rows.detach().float().cpu()
    if spec.symmetric:
        reach = _quantile(x.abs(), clip.percentile / 100)
        low, high = -reach, reach
    else:
        outside = (100 - clip.percentile) / 200
        low, high = _quantile(x, outside), _quantile(x, 1 - outside)
    return torch.from_numpy(low).to(rows.dtype), torch.from_numpy(high).to(rows.dtype)


def _quantile(rows: Tensor, q: float) -> Floats:
    """The q-quantile of each row, (C,), q from 0 to 1."""
    return np.asarray(np.quantile(rows.numpy(), q, axis=1))


ROW_ESTIMATORS: dict[str, Callable[[Tensor, QuantSpec, ClipSpec], tuple[Tensor, Tensor]]] = {
    "mse": mse_of_rows,
    "l4": l4_of_rows,
    "percentile": percentile_of_rows,
}
