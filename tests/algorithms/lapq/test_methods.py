"""SciPy's methods, from a first step of half an octave."""

import numpy as np
import pytest

from qtool.algorithms.lapq.methods import FIRST_STEP, METHODS, smallest


@pytest.mark.parametrize("method", METHODS)
def test_the_minimum_of_a_bowl_is_found(method):
    found = smallest(lambda x: float(np.sum((x - [0.3, -0.7]) ** 2)), np.zeros(2), method)
    assert found == pytest.approx([0.3, -0.7], abs=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_half_an_octave(method):
    tried = []
    smallest(lambda x: tried.append(x.copy()) or float(x @ x), np.zeros(2), method, maxiter=1)
    steps = [abs(x).max() for x in tried]
    assert next(step for step in steps if step > 0) == FIRST_STEP


def test_iterations_are_limited_and_announced():
    rounds = []
    smallest(lambda x: float(np.sum((x - x[::-1] - 1) ** 2 + x**4)), np.ones(3), "Powell", 2, rounds.append)
    assert len(rounds) == 2
