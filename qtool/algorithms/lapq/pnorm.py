"""The start of LAPQ: the quantization error in a p-norm, and the p whose ranges suit the network best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.spec import QuantSpec

P_STARTS = {"l1": 1.0, "l2": 2.0, "l3": 3.0}
P_VALUES = tuple(float(p) for p in np.linspace(2, 4, 10))


def lp_error(x: Tensor, x_min: Tensor, x_max: Tensor, grid: QuantSpec, p: float) -> float:
    """The mean of |x - x_hat|^p.

    Args:
        x: values, (C, n) or (n,).
        x_min, x_max: the range that is quantized to, () or (C,).
        grid: what it is quantized to.
        p: positive.

    Example:
        >>> import torch
        >>> grid = QuantSpec(num_bits=2, narrow_range=True)
        >>> lp_error(torch.tensor([0.5, 3.0]), torch.tensor(-1.0), torch.tensor(1.0), grid, p=2)
        2.125
    """
    x_hat = fake_quantize(x, qparams_from_range(x_min, x_max, grid))
    return float((x - x_hat).abs().double().pow(p).mean())


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the parabola of least squares through points is smallest.

    None if it opens downwards or has its minimum beyond the points.

    Example:
        >>> round(parabola_minimum([2, 3, 4], [2.0, 1.0, 2.0]), 6)
        3.0
        >>> parabola_minimum([2, 3, 4], [1.0, 2.0, 1.0]) is None
        True
    """
    square, linear, _ = np.polyfit(x, y, 2)
    if not square > 0:
        return None
    minimum = float(-linear / (2 * square))
    return minimum if min(x) <= minimum <= max(x) else None
