"""ReLU6 with a limit of its own for each channel.

Scaling the channels of a ReLU6's input by 1 / s, exactly, takes one whose limit is 6 / s_c in channel c.
It counts as "relu6" everywhere, and limit_of tells the two apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN_LIMIT = 6.0


class CappedReLU6(nn.Module):
    """min(max(x, 0), limit).

    Args:
        limit: units of x; its shape broadcasts to one image of x, such as (C, 1, 1) or (C,).
    """

    qtool_op = "relu6"
    limit: Tensor

    def __init__(self, limit: Tensor, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        # In the state dict: it is part of what the network computes, as weights are.
        self.register_buffer("limit", limit.detach().clone())

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Like F.relu6, whose argument a traced call may carry; a traced network never sets it."""
        if self.inplace:
            return x.relu_().clamp_(max=self.limit)
        return torch.minimum(x.relu(), self.limit)

    def extra_repr(self) -> str:
        return f"limit {float(self.limit.min()):.3g} to {float(self.limit.max()):.3g}"


def limit_of(module: nn.Module | None) -> Tensor | None:
    """The limits of a ReLU6 that has one for each channel; None for any other layer."""
    return module.limit if isinstance(module, CappedReLU6) else None
