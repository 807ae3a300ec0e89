"""Integers that may go either way."""

import torch

from qtool.algorithms.rounding.soft import SoftIntegers, annealed, inverse_sigmoid, rectified_sigmoid

LOW, HIGH = torch.tensor(-2.0), torch.tensor(1.0)


def _soft(wanted, start):
    return SoftIntegers(torch.tensor(wanted), torch.tensor(start), LOW, HIGH)


def test_the_sigmoid_is_inverted_over_its_whole_range():
    h = torch.linspace(0, 1, 11)
    torch.testing.assert_close(rectified_sigmoid(inverse_sigmoid(h)), h)


def test_it_starts_as_the_weight_where_the_start_is_the_nearest():
    soft = _soft([0.3, -1.2, 0.9, -0.6], [0.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(soft.soft().detach(), torch.tensor([0.3, -1.2, 0.9, -0.6]))
    assert soft.hard().tolist() == [0, -1, 1, -1]


def test_it_starts_on_the_side_of_the_start_where_that_is_not_the_nearest():
    soft = _soft([0.3, 0.3, 0.9, -1.9], [1.0, -1.0, 0.0, 0.0])
    assert soft.hard().tolist() == [1, -1, 0, 0]
    assert soft.lower.tolist() == [0, -1, 0, -1]


def test_candidates_stay_within_the_limits():
    soft = _soft([3.0, 1.2, -5.0, -2.3], [1.0, 1.0, -2.0, -2.0])
    assert bool((soft.lower >= -2).all() and (soft.lower + 1 <= 1).all())
    assert soft.hard().tolist() == [1, 1, -2, -2]


def test_decided_integers_cost_nothing_and_the_middle_costs_one():
    soft = _soft([0.0, -1.0, 0.5, -2.0], [0.0, -1.0, 1.0, -2.0])
    assert abs(float(soft.indecision(2.0).detach()) - 1 / 4) < 1e-6
    assert soft.undecided() == 1


def test_beta_falls_from_the_first_to_the_last_behind_the_warm_up():
    found = [annealed(share, 0.5, 20, 2) for share in (0.0, 0.49, 0.5, 0.75, 1.0)]
    assert found == [None, None, 20, 11, 2]
