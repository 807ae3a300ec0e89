"""Scales are those that lose least on images that the integers were not fitted to."""

import torch

from qtool.algorithms.gptq.scales import FACTORS, search_steps
from qtool.algorithms.gptq.solve import Feedback
from qtool.algorithms.rounding.problem import Problem, Sampling, pairs_of_rows, quadratic_of
from qtool.quantizers.lockstep import Lockstep

DAMPING = 0.05


def _first_layer(planned_w4, net, batches):
    folded, plan = planned_w4(net, batches, per_channel_weights=True, weight_range_factors=[1.2, 1.2])
    moment = next(Lockstep(folded.traced, folded, plan, batches).moments())
    module = folded.traced.get_submodule(moment.name)
    problem = Problem.of(moment, module, follows=True)
    rows = pairs_of_rows(moment, module, Sampling(200, "blended", True, 0))
    return problem, quadratic_of(problem, rows, "blended")


def test_no_other_multiple_loses_less_on_the_other_half(tiny_net, tiny_batches, planned_w4):
    problem, form = _first_layer(planned_w4, tiny_net, tiny_batches)
    grid, (first, second) = problem.grid, form.split()
    order = torch.arange(form.hessian.shape[-1]).expand(len(form.hessian), -1)

    def held_out(factors):
        """The loss of each channel on a grid whose scales are so many of its own, on the half not seen."""
        scale, lost = grid.scale * factors, 0.0
        for seen, other in ((first, second), (second, first)):
            hessian, linear = seen.damped(DAMPING, problem.weight)
            fed = Feedback(linear / scale, hessian, order)
            lost = lost + other.losses(fed.integers(torch.ones_like(scale), grid.low, grid.high) * scale)
        return lost

    steps = search_steps(problem, form, DAMPING, order)
    lost = held_out(steps)
    for factor in FACTORS:
        assert bool((lost <= held_out(torch.full_like(steps, factor)) * 1.001).all())
    assert len(steps.unique()) > 2
