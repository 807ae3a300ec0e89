"""Integers that may still go either way: each a lower one plus h(V), which training drives to 0 or 1.

Reference:
    Nagel et al. 2020, arXiv:2004.10568, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The sigmoid is stretched to [-0.1, 1.1], so that 0 and 1 are reached.
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
# An integer is undecided while h is further than this from both its ends.
DECIDED = 0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)."""
    return torch.clamp(torch.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


def inverse_sigmoid(h: Tensor) -> Tensor:
    """The V that gives h, for h from 0 to 1.

    Example:
        >>> rectified_sigmoid(inverse_sigmoid(torch.tensor([0.0, 0.25, 1.0])))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return torch.logit((h - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW))


class SoftIntegers:
    """The centered integers of a weight while they are learned.

    Args:
        wanted: (G, R, K), the weight in steps of the grid.
        start: (G, R, K), integers to start from; those that are not next to the weight stay candidates
            all the same, against their neighbour on the weight's side.
        low, high: (G, R, 1), limits.

    Attributes:
        v: (G, R, K), float32, what is learned.
    """

    def __init__(self, wanted: Tensor, start: Tensor, low: Tensor, high: Tensor) -> None:
        lower = torch.where(wanted >= start, start, start - 1)
        self.lower = torch.minimum(torch.maximum(lower, low), high - 1).float()
        upper = (start > self.lower).float()
        share = (wanted.float() - self.lower).clamp(0, 1)
        # Where the start is not the nearest, h begins on the start's side, but not far from the middle.
        agrees = (share >= 0.5) == (upper > 0)
        self.v = inverse_sigmoid(torch.where(agrees, share, (share + 2 * upper) / 3)).requires_grad_()

    def soft(self) -> Tensor:
        """What the integers are so far, differentiable in v."""
        return self.lower + rectified_sigmoid(self.v)

    def hard(self) -> Tensor:
        """The integers that they are nearest to."""
        return self.lower + (self.v.detach() >= 0)

    def indecision(self, beta: float) -> Tensor:
        """mean of 1 - |2 h - 1|^beta, (): 0 when all are decided."""
        return (1 - (2 * rectified_sigmoid(self.v) - 1).abs().pow(beta)).mean()

    def undecided(self) -> int:
        """How many are further than DECIDED from both ends."""
        h = rectified_sigmoid(self.v.detach())
        return int((torch.minimum(h, 1 - h) > DECIDED).sum())


def annealed(share: float, warm_up: float, first: float, last: float) -> float | None:
    """The exponent beta when a share of the steps is done; None during the warm-up.

    Example:
        >>> annealed(0.1, 0.2, 20, 2), annealed(0.2, 0.2, 20, 2), annealed(0.6, 0.2, 20, 2)
        (None, 20.0, 11.0)
    """
    if share < warm_up:
        return None
    return last + (first - last) * (1 - (share - warm_up) / (1 - warm_up))
