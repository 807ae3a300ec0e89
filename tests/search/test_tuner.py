"""When a tuning ends, what it takes over, and what it chooses."""

import math

import pytest

from qtool.search.history import open_history
from qtool.search.space import CONFIRM, TRIAL, Dimension, Space
from qtool.search.tuner import Limits

GROUPS = Space(groups=("a", "b", "c"))
MODES = Space((Dimension("mode", ("1", "2", "3", "4")),))


def by_mode(*values):
    return lambda candidate: values[int(dict(candidate.settings)["mode"]) - 1]


def test_the_first_that_meets_the_goal_ends_it(tune, make_fake):
    fake = make_fake(by_mode(60.0, 69.5, 70.0, 70.0))  # 69.5 is the limit itself
    tuned = tune("exhaustive", MODES, fake)
    assert len(fake.trials) == 2 and tuned.met and tuned.why == "the goal is met"


def test_without_a_limit_of_time_zero_is_none(tune, make_fake):
    fake = make_fake(by_mode(60.0, 69.5, 70.0, 70.0))
    clock = (float(10**6 * n) for n in range(100))
    assert tune("exhaustive", MODES, fake, limits=Limits(seconds=0), clock=clock).trials == 2


def test_no_trial_begins_behind_the_time_limit(tune, make_fake):
    fake = make_fake(by_mode(60.0, 60.0, 60.0, 60.0))
    clock = iter([0.0, 0.0, 9.9, 10.0, 11.0])
    tuned = tune("exhaustive", MODES, fake, limits=Limits(seconds=10.0), clock=clock)
    assert len(fake.trials) == 2 and tuned.why == "the time limit, --timeout 10, was reached"


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_limit_of_trials_is_honoured_within_a_batch(tune, make_fake, limit):
    fake = make_fake(by_mode(60.0, 61.0, 62.0, 63.0))
    tuned = tune("exhaustive", MODES, fake, limits=Limits(limit))
    assert len(fake.asked) == tuned.trials == limit
    assert tuned.why == f"the limit of trials, --max-trials {limit}, was reached" and not tuned.met


def test_probes_are_no_trials(tune, make_fake, by_groups):
    fake = make_fake(by_groups({"": 60.0}))
    assert tune("greedy-revert", GROUPS, fake, limits=Limits(2)).trials == 2
    assert sum(p.kind == TRIAL for p in fake.asked) == 2 < len(fake.asked)


def test_the_best_so_far_is_told_where_the_goal_is_not_met(tune, make_fake):
    tuned = tune("exhaustive", MODES, make_fake(by_mode(60.0, 66.0, math.nan, 65.0)))
    assert not tuned.met and tuned.best.number == 2
    assert tuned.why == "the strategy has tried all that it has"


def test_where_nothing_could_be_made_there_is_no_best(tune, make_fake):
    tuned = tune("exhaustive", MODES, make_fake(lambda c: math.nan))
    assert tuned.best is None and tuned.trials == 4


def test_going_on_behind_the_goal_finds_a_cheaper_one(tune, make_fake):
    fake = make_fake(by_mode(60.0, 70.0, 69.8, 69.9), cost=lambda c: 1 / int(dict(c.settings)["mode"]))
    tuned = tune("exhaustive", MODES, fake, limits=Limits(at_goal=False))
    assert tuned.trials == 4 and tuned.met and tuned.best.number == 4


def test_what_the_other_engine_does_not_confirm_does_not_count(tune, make_fake):
    fake = make_fake(by_mode(60.0, 70.0, 70.0, 60.0), confirmed=by_mode(60.0, 69.0, 69.6, 60.0))
    tuned = tune("exhaustive", MODES, fake, confirm="simulate")
    assert [p.kind for p in fake.asked] == [TRIAL, TRIAL, CONFIRM, TRIAL, CONFIRM]
    assert tuned.met and dict(tuned.best.proposal.candidate.settings) == {"mode": "3"}


@pytest.mark.parametrize("strategy", ["basic", "greedy-revert", "exhaustive", "random"])
@pytest.mark.parametrize("ended_after", [1, 2, 4, 6])
def test_a_tuning_that_was_ended_goes_on_with_the_next_trial(
    tune, make_fake, by_groups, strategy, ended_after
):
    table = by_groups({"": 60.0, "a": 61.0, "b": 62.0, "c": 60.5, "a+b": 64.0})
    space = Space((Dimension("mode", ("sym", "asym_u")),), ("a", "b", "c"))

    class KilledError(Exception):
        """As if by a signal."""

    whole = make_fake(table)
    expected = tune(strategy, space, whole, file="whole.db")
    first, second = make_fake(table), make_fake(table)

    def killed(proposals):
        for outcome in first(proposals):
            if len(first.asked) > ended_after:
                raise KilledError
            yield outcome

    with pytest.raises(KilledError):
        tune(strategy, space, killed)
    resumed = tune(strategy, space, second)
    assert [p.key for p in first.asked[:ended_after] + second.asked] == [p.key for p in whole.asked]
    assert resumed.best.proposal == expected.best.proposal and resumed.best.number == expected.best.number
    assert resumed.trials == expected.trials


def test_a_known_trial_is_not_measured_again(tune, make_fake):
    tune("exhaustive", MODES, make_fake(by_mode(60.0, 61.0, 62.0, 63.0)))
    again = make_fake(lambda c: pytest.fail("measured"))
    assert tune("exhaustive", MODES, again).best.number == 4


def test_every_trial_is_kept_with_what_it_was(tune, make_fake, tmp_path):
    tune("exhaustive", MODES, make_fake(by_mode(60.0, math.nan, 62.0, 63.0)))
    with open_history(tmp_path / "tuning.db", {"network": "fake"}) as history:
        entries = history.entries()
    assert [e.number for e in entries] == [1, 2, 3, 4]
    assert [dict(e.proposal.candidate.settings)["mode"] for e in entries] == ["1", "2", "3", "4"]
    assert entries[1].outcome.failure == "refused" and entries[2].outcome.values["top1"] == 62.0
