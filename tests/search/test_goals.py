"""What may be lost, and whether it was."""

import math

import pytest
import torch

from qtool.search.goals import Goal, drop_of


@pytest.mark.parametrize(
    ("float_score", "score", "absolute", "relative"),
    [
        (0.3185, 0.2923, 0.0262, 0.08226059),
        (-0.2923, -0.3185, 0.0262, 0.0896339),
        (0.5, 0.6, -0.1, -0.2),
        (0.0, -0.25, 0.25, 0.25),  # no share of nothing: absolute
    ],
)
def test_drops_are_those_of_the_specification(float_score, score, absolute, relative):
    assert drop_of(float_score, score, False) == pytest.approx(absolute)
    assert drop_of(float_score, score, True) == pytest.approx(relative, rel=1e-6)


def test_the_limit_itself_meets_the_goal():
    goal = Goal(max_drop=0.5)
    counts = [(758, 753), (701, 696), (333, 328)]  # whose percentages are no exact numbers
    assert all(goal.met(100 * a / 1000, 100 * b / 1000) for a, b in counts)
    assert not any(goal.met(100 * a / 1000, 100 * (b - 1) / 1000) for a, b in counts)


def test_a_higher_loss_is_a_drop_and_a_lower_one_a_gain():
    goal = Goal("loss", 0.1)
    assert goal.met(1.0, 1.1) and goal.met(1.0, 0.2) and not goal.met(1.0, 1.1001)
    assert goal.drop(1.0, 1.25) == pytest.approx(0.25)


@pytest.mark.parametrize("goal", [Goal("top1", 2.0, True), Goal("loss", 2.0, True), Goal("top5", 2.0)])
def test_the_target_is_where_the_goal_is_just_met(goal):
    target = goal.target(50.0)
    worse = target + (0.001 if goal.metric == "loss" else -0.001)
    assert goal.met(50.0, target) and not goal.met(50.0, worse)
    assert goal.drop(50.0, target) == pytest.approx(2.0)


def test_a_float_network_without_a_hit_has_an_absolute_limit():
    assert Goal(max_drop=1.0, relative=True).met(0.0, 0.0)
    assert Goal("loss", 0.5, relative=True).drop(0.0, 0.4) == pytest.approx(0.4)


def test_the_confidence_is_that_of_the_paired_difference():
    float_right = torch.ones(1000) * 100
    right = float_right.clone()
    right[:10] = 0  # 1 point lost, standard error 0.31
    error = 100 * math.sqrt(0.01 * 0.99 * 1000 / 999) / math.sqrt(1000)
    above = Goal(max_drop=1.5).confidence(float_right, right)
    assert above == pytest.approx(0.5 * (1 + math.erf(0.5 / error / math.sqrt(2))))
    assert Goal(max_drop=1.0).confidence(float_right, right) == pytest.approx(0.5)
    assert Goal(max_drop=0.5).confidence(float_right, right) == pytest.approx(1 - above)


def test_the_confidence_of_a_relative_goal_counts_what_the_float_network_gets_wrong():
    float_right = torch.tensor([100.0] * 8 + [0.0] * 2)
    right = torch.tensor([100.0] * 7 + [0.0] * 3)
    goal = Goal(max_drop=12.5, relative=True)  # 70 is 12.5 % below 80
    assert goal.confidence(float_right, right) == pytest.approx(0.5)
    assert Goal(max_drop=30.0, relative=True).confidence(float_right, right) > 0.8


def test_without_any_difference_the_confidence_is_certain():
    same = torch.full((5,), 100.0)
    assert Goal(max_drop=0.1).confidence(same, same) == 1.0
    assert Goal("loss", 0.1).confidence(same, same + 1) == 0.0
