"""Integers that minimize a quadratic form: one column after another with error feedback, then descent.

Rows u of real numbers, integers q within limits, the loss is (u - q) H (u - q). All in units of a grid; on
another, whose steps are s of these, it is (u - q s) H (u - q s).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


class Feedback:
    """Rounds one column after another, and lets the columns that follow make up for the errors.

    GPTQ goes forward with a factor of the inverse of H. Going backward with that of H itself gives the
    same integers without the inverse: with H = L L^T the loss is the square of (u - q s) L, of which
    column j depends on the columns from j on only, so j is rounded to what undoes those.

    Args:
        linear: (G, R, K), u H, float64.
        hessian: (G, K, K), H, positive definite, float64.
        order: (G, K), the columns, in the order in which they are rounded.
        block: columns whose errors reach the others by one matrix product.

    Raises:
        torch.linalg.LinAlgError: if H is not positive definite.

    Reference:
        Frantar et al. 2022, arXiv:2210.17323, section 3; Babai 1986, the nearest plane.
    """

    def __init__(self, linear: Tensor, hessian: Tensor, order: Tensor, block: int = BLOCK) -> None:
        self._backward, self._block = order.flip(1), block
        factor = torch.linalg.cholesky(_along(_along(hessian, self._backward, 1), self._backward, 2))
        # What an error of column i adds to what column j < i is rounded from.
        self._feed = (factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)).float()
        self._rows = torch.cholesky_solve(_along(linear, self._backward, 2).mT, factor).mT

    def integers(self, steps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The integers of all rows.

        Args:
            steps: (G, R, 1), s.
            low, high: (G, R, 1), limits of the integers.

        Returns:
            (G, R, K), q, integers held in float32.
        """
        u, feed = (self._rows / steps).float(), self._feed
        low, high = low.float(), high.float()
        wanted, errors, q = u.clone(), torch.empty_like(u), torch.empty_like(u)
        for stop in range(u.shape[2], 0, -self._block):
            start = max(0, stop - self._block)
            for j in range(stop - 1, start - 1, -1):
                column = slice(j, j + 1)
                q[..., column] = torch.round(wanted[..., column]).clamp_(low, high)
                errors[..., column] = u[..., column] - q[..., column]
                wanted[..., start:j] += errors[..., column] * feed[:, column, start:j]
            wanted[..., :start] += errors[..., start:stop] @ feed[:, start:stop, :start]
        return torch.empty_like(q).scatter_(2, self._backward.unsqueeze(1).expand_as(q), q)


def descend(
    q: Tensor, hessian: Tensor, linear: Tensor, low: Tensor, high: Tensor, sweeps: int, block: int = BLOCK
) -> Tensor:
    """Move each integer in turn to its best value given the others; the loss never grows.

    Args:
        q: (G, R, K), where to start.
        hessian: (G, K, K), H, with a positive diagonal.
        linear: (G, R, K), u H.
        low, high: (G, R, 1), limits of the integers.
        sweeps: at most so many over all columns; fewer when nothing changes any more.
        block: columns whose changes reach the others by one matrix product.

    Returns:
        (G, R, K), in q's dtype.
    """
    h, low, high = hessian.float(), low.float(), high.float()
    diagonal = h.diagonal(dim1=-2, dim2=-1)  # (G, K)
    q = q.float().clone()
    for _ in range(sweeps):
        # Anew for each sweep, so that rounding errors do not add up.
        slope = (linear - q.double() @ hessian).float()
        changed = False
        for start in range(0, q.shape[2], block):
            here = slice(start, start + block)
            before = q[..., here].clone()
            _descend_block(q[..., here], slope[..., here], h[:, here, here], diagonal[:, here], low, high)
            steps = q[..., here] - before
            if bool(steps.any()):
                changed = True
                slope[..., here.stop :] -= steps @ h[:, here, here.stop :]
        if not changed:
            break
    return q


def _descend_block(q: Tensor, slope: Tensor, h: Tensor, diagonal: Tensor, low: Tensor, high: Tensor) -> None:
    """One sweep over few columns, in place; slope is left as it is for columns that were passed."""
    for j in range(q.shape[2]):
        column = slice(j, j + 1)
        best = torch.round(q[..., column] + slope[..., column] / diagonal[:, None, column])
        step = best.clamp_(low, high).sub_(q[..., column])
        q[..., column] += step
        slope[..., j:] -= step * h[:, column, j:]


def _along(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x with one of its axes in another order, group by group."""
    return x.gather(dim, order.unsqueeze(3 - dim).expand_as(x))
