"""The verdict of a tuning."""

import pytest
import torch

from qtool.pipeline.steps import summarize
from qtool.pipeline.tuning.result import image_values, judge
from qtool.search.goals import Goal
from qtool.search.history import Entry
from qtool.search.outcomes import Outcome
from qtool.search.space import Candidate, Proposal
from qtool.search.tuner import Tuned

BEST = Entry(3, Proposal(Candidate()), Outcome({"top1": 90.0}), "", 0, {}, "")
LABELS = torch.zeros(200, dtype=torch.int64)


def right(count: int):
    """A result with so many of 200 images right, and the loss of a certain guess."""
    logits = torch.zeros(200, 2)
    logits[:count, 0] = logits[count:, 1] = 4.0
    return summarize(LABELS, logits, 1.0, torch.arange(200))


def verdict(goal: Goal, count: int, met: bool = True):
    return judge(goal, right(190), right(count), Tuned(BEST, met, 5, "the reason"), BEST)


def test_a_goal_that_is_met_says_how_sure_that_is():
    found = verdict(Goal(max_drop=2.5), 186)
    assert found.met and found.drop == pytest.approx(2.0) and 0.5 < found.confidence < 0.9
    assert found.words.startswith("goal met: drop 2.000, 2.5 points of top-1 allowed;")
    assert "trial 3; the reason" in found.words


def test_a_goal_met_on_other_images_alone_is_not_met():
    found = verdict(Goal(max_drop=1.0), 186)
    assert not found.met and "not on those that validate" in found.words and found.confidence < 0.5


def test_a_goal_that_no_trial_met_is_not_met_by_luck():
    found = verdict(Goal(max_drop=2.5), 190, met=False)
    assert not found.met and found.words == (
        "goal not met: drop 0.000, 2.5 points of top-1 allowed (the best is trial 3; the reason)"
    )


def test_relative_goals_are_told_in_percent():
    found = verdict(Goal(max_drop=2.5, relative=True), 186)
    assert found.drop == pytest.approx(100 * 4 / 190) and "2.5 % allowed" in found.words


@pytest.mark.parametrize("metric", ["top1", "top5", "loss"])
def test_the_values_of_images_average_to_the_metric(metric):
    result = right(150)
    assert float(image_values(metric, result).mean()) == pytest.approx(result.as_dict()[metric])
