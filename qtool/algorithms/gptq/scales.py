"""Scales of output channels, chosen with the integers that error feedback finds on them.

Ranges of weights are found for integers that are the nearest. Those of GPTQ make up for each other's errors,
most of all for small ones, so with few bits other steps lose less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.algorithms.gptq.solve import Feedback
from qtool.algorithms.rounding.problem import Problem

# Of the scales that a layer has; twice as many gave hardly more.
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def search_steps(problem: Problem, feedback: Feedback) -> Tensor:
    """Of multiples of each channel's scale the one on whose integers it loses least.

    Returns:
        (G, R, 1), what a step is worth in steps of the grid that the layer has.
    """
    tried = [problem.steps(torch.full_like(problem.bias, factor)) for factor in FACTORS]
    losses = [feedback.integers(steps, problem.grid.low, problem.grid.high)[1] for steps in tried]
    best = torch.stack(losses).argmin(dim=0, keepdim=True).unsqueeze(3)
    return torch.stack(tried).gather(0, best).squeeze(0)


def refitted_steps(linear: Tensor, hessian: Tensor, found: Tensor, steps: Tensor) -> Tensor:
    """The steps with which given integers lose least, within those that search_steps tries.

    Args:
        linear: (G, R, K), u H, in units of the grid that the layer has.
        hessian: (G, K, K), H.
        found: (G, R, K), the integers, q.
        steps: (G, R), those on which they were found; they stay where all integers are zero.

    Returns:
        (G, R), s = u H q / q H q.
    """
    q = found.double()
    up = torch.einsum("grk,grk->gr", linear, q)
    down = torch.einsum("grk,grk->gr", q @ hessian, q)
    best = (up / down.clamp(min=torch.finfo(torch.float64).tiny)).clamp(FACTORS[0], FACTORS[-1])
    return torch.where(down > 0, best, steps)
