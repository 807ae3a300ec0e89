"""Reductions over activations that cost a fraction of the layer that made them.

torch's reductions differ in speed by a factor of fifty: those over an inner axis, or over an outer
one whose inner length is a multiple of LANES, run on vectors; aminmax over an axis and var_mean do
not. So tensors are first seen as rows, in whichever of two orders their memory has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Four vectors of eight floats: inner lengths that are no multiple of it fall back to scalars.
LANES = 32
# Elements which, and whose squares, are added up in float32.
ROW = 1 << 14
# What has to be left of a difference of two sums of squares, as a share of the first; both are good to 1e-7.
LEFT = 0.05
# Columns in which sums of small deviations are taken: float32 is exact enough for the few elements of one.
WIDE = 1 << 12


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
    def of_parts(cls, lows: list[Tensor], highs: list[Tensor], images: int) -> Extremes:
        """Those of a chunk of images, from what rows_extremes gives of its parts, in order."""
        # So few numbers that NumPy, which starts an operation sooner, is faster.
        low, high = (np.concatenate([part.cpu().numpy() for part in parts]) for parts in (lows, highs))
        of_images = low.reshape(images, -1).min(1), high.reshape(images, -1).max(1)
        return cls(*of_images, low.min(0), high.max(0))

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


def rows_extremes(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest value over the inner rows of (n, R, C), or over the last axis of (n, C, R).

    NaN among the values makes both NaN.

    Returns:
        (n, C) each, in memory of their own.
    """
    if channels_last:
        return _outer(x, torch.amin), _outer(x, torch.amax)
    if x.shape[2] == 1:
        values = x[:, :, 0].clone()
        return values, values
    return x.amin(2), x.amax(2)


def _outer(x: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce axis 1 of (N, R, C), with several rows side by side where C alone is no full vector."""
    n, r, c = x.shape
    side = next((k for k in (1, 2, 4, 8, 16, 32) if k * c % LANES == 0), 1)
    if side == 1 or r < 2 * side:
        return reduce(x, 1)
    whole = r // side * side
    found = reduce(reduce(x[:, :whole].reshape(n, whole // side, side * c), 1).reshape(n, side, c), 1)
    if whole < r:
        found = reduce(torch.stack([found, reduce(x[:, whole:], 1)]), 0)
    return found


def mean_and_squares(x: Tensor) -> tuple[float, float]:
    """Mean of all elements, and sum of their squared deviations from it.

    The second is the difference of two sums; where little is left of it, it is measured otherwise.

    Args:
        x: (K,) float32, contiguous.
    """
    count = len(x)
    whole = count // ROW * ROW
    total = squares = 0.0
    if whole < count:
        rest = x[whole:].cpu().numpy().astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for what is not finite
            total, squares = float(rest.sum()), float(np.square(rest).sum())
    if whole:
        # By rows, as then the result is the same for every number of threads.
        rows = x[:whole].view(-1, ROW)
        norms = torch.linalg.vector_norm(rows, dim=1).cpu().numpy()
        total += float(rows.sum(1).cpu().numpy().sum(dtype=np.float64))
        squares += float(np.square(norms, dtype=np.float64).sum())
    mean = total / count
    spread = squares - count * mean**2
    if spread < LEFT * squares:
        return _mean_and_small_squares(x)
    return mean, spread


def _mean_and_small_squares(x: Tensor) -> tuple[float, float]:
    """The same for values that lie close together, far from zero.

    Batch norm's own kernel gives mean and variance of each column in two passes over cached data. It adds
    up in float32, so the elements are laid out as WIDE columns of few elements, which are put together
    in float64.
    """
    whole = len(x) // WIDE * WIDE
    parts, weights, within = [x[whole:].double().cpu().numpy()], [1], 0.0
    if whole:
        columns = x[:whole].view(-1, 1, 1, WIDE).permute(0, 3, 1, 2)  # (rows, WIDE, 1, 1), channels last
        means, variances = torch.ops.aten.batch_norm_update_stats(columns, None, None, 0.0)
        parts.append(means.cpu().numpy().astype(np.float64))
        weights.append(whole // WIDE)
        within = weights[1] * float(variances.cpu().numpy().sum(dtype=np.float64))
    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for what is not finite
        mean = sum(w * float(p.sum()) for w, p in zip(weights, parts, strict=True)) / len(x)
        between = sum(w * float(np.square(p - mean).sum()) for w, p in zip(weights, parts, strict=True))
    return mean, within + between
