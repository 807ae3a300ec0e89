"""LAPQ: the start, the search, and what it remembers."""

import numpy as np
import pytest
import torch

from qtool.algorithms.lapq import (
    P_VALUES,
    LapqSpec,
    lapq,
    lp_error,
)
from qtool.numerics.spec import LayerSpec, QuantSpec


@pytest.mark.parametrize("options", [{}, {"per_channel_weights": True}, {"mode": "asym_u"}])
@pytest.mark.parametrize("init_mode", ["auto", "l2", "none"])
def test_the_end_is_not_worse_than_the_start(trials, init_mode, options, problem):
    """D11: the network kept the ranges of the last trial, not those of the best."""
    settings = LapqSpec(init_mode=init_mode, maxfev=20)
    tensors, specs = problem(settings, **options)
    result = lapq(tensors, specs, lambda s: trials.score(s).loss, settings)
    assert result.loss <= result.initial_loss
    assert result.loss == trials.score(result.specs).loss
    assert result.initial_loss == trials.score(result.initial).loss
    assert (result.p is None) == (init_mode == "none")


def test_auto_takes_the_best_p(trials, problem):
    settings = LapqSpec(maxfev=1)
    tensors, specs = problem(settings)
    result = lapq(tensors, specs, lambda s: trials.score(s).loss, settings)
    assert set(P_VALUES) <= set(result.losses_of_p)
    assert result.initial_loss == min(result.losses_of_p.values()) == result.losses_of_p[result.p]


@pytest.mark.parametrize("method", ["Powell", "Nelder-Mead"])
@pytest.mark.parametrize("basinhopping", [False, True])
def test_every_method_finds_a_better_range(method, basinhopping, tensor):
    grid = QuantSpec(num_bits=3)
    settings = LapqSpec("none", method=method, basinhopping=basinhopping, basinhopping_niter=2, maxiter=20)

    def loss(specs):
        low, high = (torch.tensor(v) for v in specs["conv1"].output_range)
        return lp_error(values, low, high, grid, 2)

    values = 0.4 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    result = lapq([tensor(grid, values=values)], {"conv1": LayerSpec(output=grid)}, loss, settings)
    assert result.loss < 0.2 * result.initial_loss


def test_a_remembered_search_computes_nothing(trials, problem):
    settings = LapqSpec(maxfev=15)
    tensors, specs = problem(settings)
    known: dict[str, list[float]] = {}

    def memo(name, compute):
        known.setdefault(name, None)
        known[name] = known[name] or list(compute())
        return known[name]

    first = lapq(tensors, specs, lambda s: trials.score(s).loss, settings, memo)
    again = lapq(tensors, specs, lambda _: pytest.fail("computed"), settings, memo)
    assert again == first


@pytest.mark.parametrize("method", ["Powell", "Nelder-Mead"])
def test_evaluations_are_limited_and_no_point_is_evaluated_twice(problem, trials, method):
    settings = LapqSpec("none", method=method, maxiter=None, maxfev=25)
    tensors, specs = problem(settings)
    points = []

    def loss(asked):
        points.append(repr([(spec.output_range, spec.weight_range_factors) for spec in asked.values()]))
        return trials.score(asked).loss

    result = lapq(tensors, specs, loss, settings)
    assert result.evaluations == len(points) == len(set(points)) == 26  # with the start


def test_the_watcher_sees_every_evaluation_and_the_best(problem, trials):
    settings = LapqSpec("l2", maxiter=1)
    tensors, specs = problem(settings)
    states = []
    result = lapq(tensors, specs, lambda s: trials.score(s).loss, settings, watch=states.append)
    assert [s.evaluations for s in states] == list(range(1, result.evaluations + 1))
    assert [s.best_loss for s in states] == np.minimum.accumulate([s.loss for s in states]).tolist()
    assert states[0].pace is None and states[0].phase == "the initialisation"
    assert states[-1].pace.line == len(tensors) - 1
