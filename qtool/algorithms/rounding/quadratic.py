"""The loss of a layer's integers as a quadratic form, so that no image is needed to try others.

With H = sum x x^T over the rows x that the quantized network reads, and B = sum y x^T for the outputs y
that are wanted, the loss of a weight row v is v H v - 2 B v + sum y^2. Where the bias may follow, x and y
are taken without their means, and the bias makes up for these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratic:
    """The form; G groups of R output channels with K inputs each, all float64.

    Args:
        hessian: (G, K, K), H.
        linear: (G, R, K), B.
        power: (G, R), sum of y^2.
        mean_x: (G, K), of x.
        mean_y: (G, R), of y.
        count: of rows.
        centered: whether the first three are without means.
        wanted: (G, R, K), the weight whose outputs those that are wanted are; None for others.
        halves: the forms of two halves of the rows, of different images, for the outputs that were wanted at
            first; none where one of them would have no rows.
    """

    hessian: Tensor
    linear: Tensor
    power: Tensor
    mean_x: Tensor
    mean_y: Tensor
    count: int
    centered: bool
    wanted: Tensor | None = None
    halves: tuple[Quadratic, ...] = ()

    def losses(self, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """The mean squared error of each output channel.

        Args:
            values: (G, R, K), of the weight.
            bias: (G, R), a fixed one; None for the best, or for none where the form is not centered.

        Returns:
            (G, R), never negative.
        """
        at = torch.einsum("grk,grk->gr", values @ self.hessian - 2 * self.linear, values)
        found = (at + self.power) / self.count
        if bias is not None and self.centered:
            found = found + (self.best_bias(values) - bias).square()
        return found.clamp(min=0)

    def best_bias(self, values: Tensor) -> Tensor:
        """The bias with which the outputs' means are those that are wanted, (G, R)."""
        return self.mean_y - torch.einsum("grk,gk->gr", values, self.mean_x)

    def for_weight(self, values: Tensor) -> Quadratic:
        """The form for the outputs of another weight, (G, R, K), on the same rows; their means stay."""
        linear = values @ self.hessian
        return replace(self, linear=linear, power=torch.einsum("grk,grk->gr", linear, values), wanted=values)

    def split(self) -> tuple[Quadratic, ...]:
        """The forms of two halves of the rows for the same outputs as this one; none where it has none."""
        wanted = self.wanted
        return self.halves if wanted is None else tuple(half.for_weight(wanted) for half in self.halves)

    def damped(self, share: float, towards: Tensor) -> tuple[Tensor, Tensor]:
        """H + d I and B + d W, which pull weights towards W where the rows do not say what they should be.

        Args:
            share: d as a share of the mean of H's diagonal; of 1 where that is zero.
            towards: (G, R, K), W.
        """
        mean = self.hessian.diagonal(dim1=-2, dim2=-1).mean(dim=-1)  # (G,)
        damping = (torch.where(mean > 0, mean, 1.0) * share).reshape(-1, 1, 1)
        identity = torch.eye(self.hessian.shape[-1], dtype=torch.float64)
        return self.hessian + damping * identity, self.linear + damping * towards


class Sums:
    """Collects a Quadratic from rows, batch by batch.

    Args:
        groups, channels, inputs: G, R and K.
    """

    def __init__(self, groups: int, channels: int, inputs: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64)

        self._count = 0
        self._hessian, self._linear = zeros(inputs, inputs), zeros(channels, inputs)
        self._power, self._sum_x, self._sum_y = zeros(channels), zeros(inputs), zeros(channels)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows (G, n, K) that are read, and the outputs (G, n, R) that are wanted for them."""
        turned = x.transpose(1, 2)
        self._count += x.shape[1]
        # Products in the rows' own float32, as fast as the network itself; sums of batches in float64.
        self._hessian += turned @ x
        self._linear += y.transpose(1, 2) @ x
        self._power += y.double().square().sum(dim=1)
        self._sum_x += x.double().sum(dim=1)
        self._sum_y += y.double().sum(dim=1)

    def __add__(self, other: Sums) -> Sums:
        """Those of the rows of both."""
        found = Sums(0, 0, 0)
        for name in ("_count", "_hessian", "_linear", "_power", "_sum_x", "_sum_y"):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        return found

    @property
    def count(self) -> int:
        """How many rows there have been."""
        return self._count

    def quadratic(self, centered: bool) -> Quadratic:
        """The form of all rows so far; the sums are used up."""
        n = self._count
        mean_x, mean_y = self._sum_x / n, self._sum_y / n
        if centered:
            self._hessian -= n * mean_x.unsqueeze(2) * mean_x.unsqueeze(1)
            self._linear -= n * mean_y.unsqueeze(2) * mean_x.unsqueeze(1)
            self._power -= n * mean_y.square()
        return Quadratic(self._hessian, self._linear, self._power, mean_x, mean_y, n, centered)
