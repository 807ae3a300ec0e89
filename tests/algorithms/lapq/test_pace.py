"""Where Powell's method is, and how long the rest takes."""

import numpy as np
import pytest
from scipy.optimize import minimize

from qtool.algorithms.lapq.pace import TYPICAL_EVALUATIONS, Pace, PaceKeeper, seconds_left


def test_the_lines_of_powells_method_are_recognized():
    keeper, size, seen = PaceKeeper(5), 5, []

    def bowl(x):
        keeper.see(x, True)
        seen.append(keeper.pace)
        return float(np.sum((x - np.arange(1, size + 1)) ** 2))

    minimize(bowl, np.zeros(size), method="Powell", options={"maxiter": 1})
    assert {pace.line for pace in seen} == set(range(size))
    assert [pace.line for pace in seen] == sorted(pace.line for pace in seen)
    assert seen[-1].lines == size - 1  # the last one has not ended
    assert seen[-1].evaluations == len(seen)


def test_another_iteration_starts_at_the_first_line():
    keeper = PaceKeeper(3)
    for vector in ([0, 0, 0], [1, 0, 0], [1, 1, 0]):
        keeper.see(np.array(vector, float), True)
    assert keeper.pace == Pace(1, 1, 1, 3)
    keeper.start_iteration()
    assert keeper.pace == Pace(2, 0, 2, 3)
    keeper.see(np.array([2.0, 1, 0]), True)
    assert keeper.pace == Pace(2, 0, 2, 4)


def test_known_points_cost_nothing():
    keeper = PaceKeeper(2)
    for _ in range(3):
        keeper.see(np.zeros(2), False)
    assert keeper.pace.evaluations == 0


def test_later_lines_are_expected_to_take_what_their_trials_take():
    at = Pace(iteration=1, line=0, lines=0, evaluations=3)
    assert seconds_left(at, [2.0, 1.0], 1, None) == TYPICAL_EVALUATIONS * 2.0
    assert seconds_left(at, [2.0, 1.0], 2, None) == TYPICAL_EVALUATIONS * 5.0
    measured = Pace(iteration=1, line=1, lines=1, evaluations=9)
    assert seconds_left(measured, [2.0, 1.0], 1, None) == pytest.approx(6 * 0.5)


def test_the_nearer_limit_counts():
    at = Pace(iteration=1, line=0, lines=0, evaluations=3)
    assert seconds_left(at, [2.0, 1.0], 1, 5) == 3.0
    assert seconds_left(at, [2.0, 1.0], None, None) is None
