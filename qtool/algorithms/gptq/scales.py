"""Scales of output channels, chosen with the integers that error feedback finds on them.

Ranges of weights are found for integers that are the nearest. Those of GPTQ make up for each other's errors,
so other steps can lose less. Which do on the rows that the integers were fitted to need not on others, so a
step is judged by rows that are held out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.algorithms.gptq.solve import Feedback
from qtool.algorithms.rounding.problem import Problem
from qtool.algorithms.rounding.quadratic import Quadratic

# Of the scales that a layer has.
FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def search_steps(problem: Problem, quadratic: Quadratic, damping: float, order: Tensor) -> Tensor:
    """Of multiples of each channel's scale the one that loses least, with integers for other images.

    Args:
        problem: the layer.
        quadratic: its loss, with halves: integers are found on each, and lose what they do on the other.
        damping: see GptqSettings.
        order: (G, K), in which columns are rounded.

    Returns:
        (G, R, 1), what a step is worth in steps of the grid that the layer has.
    """
    grid = problem.grid
    tried = [problem.steps(torch.full_like(problem.bias, factor)) for factor in FACTORS]
    losses = torch.zeros(len(tried), *problem.bias.shape, dtype=torch.float64)
    halves = quadratic.split()
    for seen, held_out in (halves, halves[::-1]):
        hessian, linear = seen.damped(damping, problem.weight)
        feedback = Feedback(linear / grid.scale, hessian, order)
        for number, steps in enumerate(tried):
            found = feedback.integers(steps, grid.low, grid.high)
            losses[number] += held_out.losses(problem.values(found) * steps)
    best = losses.argmin(dim=0, keepdim=True).unsqueeze(3)
    return torch.stack(tried).gather(0, best).squeeze(0)
