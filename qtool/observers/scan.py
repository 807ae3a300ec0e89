"""Reductions over activations that cost a fraction of the layer that made them.

torch's reductions differ in speed by a factor of fifty: those over an inner axis, or over an outer
one whose inner length is a multiple of LANES, run on vectors; aminmax over an axis and var_mean do
not. A part of a tensor is read by several of them while it is in the cache. Between any two, Python
would wait for its lock, as chunks go through the network in several threads, and that takes longer than the
reductions; so what is here is also TorchScript, which needs no lock: its annotations are read by
torch.jit, and constants are defaults of arguments.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Four vectors of eight floats: inner lengths that are no multiple of it fall back to scalars.
LANES = 32
# Elements which, and whose squares, are added up in float32, at most; so few or fewer are in float64.
ROW, SHORT_ROW = 1 << 14, 1 << 10
# What has to be left of a difference of two sums of squares, as a share of the first; both are good to 1e-7.
LEFT = 0.05
# Columns in which sums of small deviations are taken: float32 is exact enough for the few elements of one.
WIDE = 1 << 12


class Sums(NamedTuple):
    """Sums of a tensor's values.

    Args:
        sums: of rows, (rows,) float32.
        norms: roots of the sums of squares of the same rows, (rows,) float32.
        apart: how many elements, their mean, and their squared deviations from it, of each part whose
            values are few, lie close together, far from zero, or have squares beyond float32; in place
            of rows.
    """

    sums: Tensor
    norms: Tensor
    apart: list[tuple[int, float, float]]


def rows_extremes(x: Tensor, channels_last: bool, lanes: int = LANES) -> tuple[Tensor, Tensor]:
    """Smallest and largest value over the inner rows of (n, R, C), or over the last axis of (n, C, R).

    NaN among the values makes both NaN.

    Returns:
        (n, C) each, in memory of their own.
    """
    if not channels_last:
        if x.size(2) > 1:
            return x.amin(2), x.amax(2)
        values = x.select(2, 0).clone()
        return values, values
    n, r, c = x.size(0), x.size(1), x.size(2)
    side = 1  # rows side by side, where C alone is no full vector
    while side < lanes and side * c % lanes != 0:
        side *= 2
    if side == 1 or r < 2 * side:
        return x.amin(1), x.amax(1)
    whole = r // side * side
    wide = x.narrow(1, 0, whole).reshape(n, whole // side, side * c)
    low, high = wide.amin(1).view(n, side, c), wide.amax(1).view(n, side, c)
    if whole < r:
        rest = x.narrow(1, whole, r - whole)
        low, high = torch.cat([low, rest], 1), torch.cat([high, rest], 1)
    return low.amin(1), high.amax(1)


@functools.cache
def row_length(count: int) -> int:
    """In how long rows so many elements are added up: a divisor of the count, where one is near ROW."""
    return next((n for n in range(min(count, ROW), SHORT_ROW, -1) if count % n == 0), min(count, ROW))


def _add_up(
    x: Tensor,
    row: int,
    sums: list[Tensor],
    norms: list[Tensor],
    apart: list[tuple[int, float, float]],
    left: float = LEFT,
    short: int = SHORT_ROW,
) -> None:
    """Add the sums of rows of x, (K,), and the roots of their sums of squares, float32; else to apart."""
    count = x.numel()
    if count <= short:
        mean, squares = _in_float64(x, row)
        apart.append((count, mean, squares))
        return
    whole = count // row * row
    # By rows, as then the result is the same for every number of threads.
    rows = x.narrow(0, 0, whole).view(-1, row)
    sum, norm = rows.sum(1), torch.linalg.vector_norm(rows, 2.0, [1])
    if whole < count:
        rest = x.narrow(0, whole, count - whole).view(1, -1)
        sum = torch.cat([sum, rest.sum(1)])
        norm = torch.cat([norm, torch.linalg.vector_norm(rest, 2.0, [1])])
    total, root = float(sum.sum()), float(torch.linalg.vector_norm(norm))
    if not math.isfinite(root):
        mean, squares = _in_float64(x, row)
        apart.append((count, mean, squares))
    elif root * root - total * total / count < left * root * root:
        mean, squares = _mean_and_small_squares(x)
        apart.append((count, mean, squares))
    else:
        sums.append(sum)
        norms.append(norm)


def _mean_and_small_squares(x: Tensor, wide: int = WIDE) -> tuple[float, float]:
    """Mean of values that lie close together, far from zero, and sum of their squared deviations from it.

    Batch norm's own kernel gives mean and variance of each column in two passes over cached data. It adds
    up in float32, so the elements are laid out as WIDE columns of few elements, which are put together
    in float64.

    Args:
        x: (K,) float32, contiguous.
        wide: see WIDE.
    """
    count = x.numel()
    deep = count // wide
    rest = x.narrow(0, deep * wide, count - deep * wide).double()
    if deep == 0:
        mean = float(rest.mean())
        return mean, float((rest - mean).square().sum())
    columns = x.narrow(0, 0, deep * wide).view(-1, 1, 1, wide).permute(0, 3, 1, 2)  # channels last
    means, variances = torch.batch_norm_update_stats(columns, None, None, 0.0)
    means = means.double()
    mean = (deep * float(means.sum()) + float(rest.sum())) / count
    between = deep * float((means - mean).square().sum()) + float((rest - mean).square().sum())
    return mean, deep * float(variances.sum(dtype=torch.float64)) + between


def _in_float64(x: Tensor, row: int) -> tuple[float, float]:
    """The same of few values, or such whose squares are beyond float32; not finite if x is not."""
    total = squares = 0.0
    for part in torch.split(x, row):
        total += float(part.sum(dtype=torch.float64))
    mean = total / x.numel()
    for part in torch.split(x, row):
        squares += float((part.double() - mean).square().sum())
    return mean, squares


def scan(
    parts: list[Tensor], rows: list[int], channels_last: bool, extremes: bool, limits: list[float]
) -> tuple[Tensor, Tensor, Sums, Sums]:
    """Extremes and sums of a tensor that is cut into parts.

    Args:
        parts: (n, R, C) if channels_last, else (n, C, R) each, contiguous, float32.
        rows: for each, see row_length.
        channels_last: which of the two.
        extremes: whether they are wanted.
        limits: low and high, to which the values are clamped in place, part by part, once they are taken
            in; or none.

    Returns:
        low, high: see rows_extremes, those of all parts; empty if not wanted.
        sums: of all values.
        clamped: of the values after the clamp; empty without limits.
    """
    none = parts[0].new_zeros(0)
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    sums, norms, clamped_sums, clamped_norms = [none], [none], [none], [none]
    apart: list[tuple[int, float, float]] = []
    clamped_apart: list[tuple[int, float, float]] = []
    for part, row in zip(parts, rows):  # noqa: B905  # torch.jit has no strict
        if extremes:
            low, high = rows_extremes(part, channels_last)
            lows.append(low)
            highs.append(high)
        flat = part.reshape(-1)
        _add_up(flat, row, sums, norms, apart)
        if len(limits) == 2:
            flat.clamp_(limits[0], limits[1])
            _add_up(flat, row, clamped_sums, clamped_norms, clamped_apart)
    return (
        torch.cat(lows) if extremes else none,
        torch.cat(highs) if extremes else none,
        Sums(torch.cat(sums), torch.cat(norms), apart),
        Sums(torch.cat(clamped_sums), torch.cat(clamped_norms), clamped_apart),
    )


def absolute_deviation(x: Tensor, pivot: float, row: int) -> float:
    """Sum of |x - pivot|; x is (K,) float32, row as row_length says."""
    off = (x - pivot).abs_()
    whole = len(x) // row * row
    total = float(off.narrow(0, 0, whole).view(-1, row).sum(1).sum(dtype=torch.float64))
    for part in torch.split(off.narrow(0, whole, len(x) - whole), row):
        total += float(part.sum())
    if math.isfinite(total):
        return total
    total = 0.0
    for part in torch.split(x, row):
        total += float((part.double() - pivot).abs_().sum())
    return total


def count(counts: Tensor, values: list[Tensor], scale: float, first: int) -> None:
    """Add to counts how many values lie in each bin.

    Args:
        counts: (bins,) int64, few enough for int16.
        values: (K,) float32 each.
        scale: bins in a unit, a power of two; bin numbers are exact in float32.
        first: number of the first bin.
    """
    index = torch.cat(values).mul_(scale).floor_().sub_(first)
    # The smallest type that bincount takes quickly.
    counts.add_(torch.bincount(index.to(torch.int16), minlength=counts.numel()))


@functools.cache
def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function of this module as TorchScript; as it is, where it cannot be compiled: the same, slower."""
    jit: Any = torch.jit
    with warnings.catch_warnings():
        # torch warns that TorchScript will go one day.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        with contextlib.suppress(RuntimeError, OSError, AttributeError):  # OSError: the source is not at hand
            return jit.script(function)  # type: ignore[no-any-return]
    return function


def compile_all() -> None:
    """Compile what calibration calls, in the thread that does so first."""
    for function in (scan, absolute_deviation, count):
        compiled(function)
