"""Accuracy control: the right group first, one step uphill, and ranking anew."""

import pytest

from qtool.search.space import PROBE, RANKING, Dimension, Space

GROUPS = Space(groups=("a", "b", "c"))


def test_the_group_whose_removal_leaves_the_smallest_error_goes_first(tune, make_fake, by_groups):
    fake = make_fake(
        by_groups({"": 60.0, "b": 69.6}),
        error=lambda c: {"": 1.0, "a": 0.9, "b": 0.1, "c": 0.8}["+".join(dict(c.raised))],
    )
    tuned = tune("greedy-revert", GROUPS, fake)
    assert fake.raised == ["", "b"] and tuned.met
    ranking = [p for p in fake.asked if p.kind == RANKING]
    assert [dict(p.candidate.raised) for p in ranking] == [{}, {"a": 0}, {"b": 0}, {"c": 0}]
    assert all(p.images == (3, 1) for p in ranking)  # those that the start does worst


def test_groups_of_equal_benefit_go_in_the_order_of_execution(tune, make_fake, by_groups):
    fake = make_fake(by_groups({"": 60.0}), error=lambda c: 1.0)
    tune("greedy-revert", GROUPS, fake)
    assert fake.raised == ["", "a", "a+b", "a+b+c"]


def test_success_with_the_last_group_is_success(tune, make_fake, by_groups):
    fake = make_fake(by_groups({"": 60.0, "a": 61.0, "a+b": 62.0, "a+b+c": 70.0}), error=lambda c: 1.0)
    assert tune("greedy-revert", GROUPS, fake).met


def test_one_step_may_do_harm_and_a_second_is_undone_and_groups_ranked_anew(tune, make_fake, by_groups):
    errors = {"": 1.0, "a": 0.1, "b": 0.2, "c": 0.3, "a+c": 0.05, "a+b": 0.06, "a+b+c": 0.01}
    table = {"": 60.0, "a": 59.0, "a+b": 58.0, "a+c": 65.0, "a+b+c": 66.0}
    fake = make_fake(by_groups(table), error=lambda c: errors["+".join(dict(c.raised))])
    tuned = tune("greedy-revert", GROUPS, fake)
    # a does harm and stays, b does more and is undone; then c is ahead of b, and both stay.
    assert fake.raised == ["", "a", "a+b", "a+c", "a+b+c"]
    again = [dict(p.candidate.raised) for p in fake.asked if p.kind == RANKING][4:]
    assert again == [{"a": 0, "b": 0}, {"a": 0, "c": 0}]  # what a alone leaves is known
    assert tuned.best.outcome.values["top1"] == 66.0


def test_settings_are_found_by_the_error_before_any_group_is_reverted(tune, make_fake):
    space = Space(
        (Dimension("mode", ("sym", "asym_u")), Dimension("preset", (None, "fast"), recipe=True)), ("a",)
    )
    fake = make_fake(
        lambda c: 65.0 + dict(c.settings).get("mode").count("asym") + len(c.raised),
        error=lambda c: 1.0 if dict(c.settings)["mode"] == "sym" else 0.5,
    )
    tune("greedy-revert", space, fake)
    probes = [tuple(dict(p.candidate.settings).values()) for p in fake.asked if p.kind == PROBE]
    assert probes == [("sym", None), ("asym_u", None), ("asym_u", "fast")]  # the last one's twin is known
    assert fake.settings("mode", "preset") == [("sym", None), ("asym_u", None), ("asym_u", None)]
    assert fake.raised == ["", "", "a"]


def test_settings_that_turn_out_worse_are_not_kept(tune, make_fake):
    space = Space((Dimension("mode", ("sym", "asym_u")),), ("a",))
    fake = make_fake(
        lambda c: 60.0 - dict(c.settings)["mode"].count("asym"),
        error=lambda c: 1.0 if dict(c.settings)["mode"] == "sym" else 0.5,
    )
    tune("greedy-revert", space, fake)
    assert fake.settings("mode") == [("sym",), ("asym_u",), ("sym",)]


def test_more_bits_are_tried_before_float(tune, make_fake):
    fake = make_fake(lambda c: 60.0 + sum(4 if b == 0 else 1 for _, b in c.raised), error=lambda c: 1.0)
    tuned = tune("greedy-revert", Space(groups=("a", "b"), fallback=(8, 0)), fake, max_drop=2.0)
    assert fake.raised == ["", "a:8", "a:8+b:8", "a+b:8", "a+b"] and tuned.met


@pytest.mark.parametrize("broken", ["a", "b"])
def test_a_probe_that_cannot_be_made_goes_last(tune, make_fake, by_groups, broken):
    fake = make_fake(by_groups({"": 60.0}), error=lambda c: float("inf") if broken in dict(c.raised) else 1.0)
    tune("greedy-revert", Space(groups=("a", "b")), fake)
    assert fake.raised[1] == ("b" if broken == "a" else "a")
