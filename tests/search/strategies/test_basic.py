"""The order of the basic strategy."""

from qtool.search.space import Dimension, Space
from qtool.search.tuner import Limits

SPACE = Space(
    (
        Dimension("mode", ("sym", "asym_u")),
        Dimension("clip", ("none", "auto")),
        Dimension("ends", (None, 8), recipe=True),
        Dimension("preset", (None, "fast", "accurate"), recipe=True),
    ),
    groups=("a", "b", "c"),
    fallback=(8, 0),
)


def test_everything_is_tried_in_the_order_of_the_specification(tune, make_fake, by_groups):
    fake = make_fake(by_groups({"": 60.0, "a": 62.0, "b": 61.0, "c": 63.0, "a+c": 64.0, "a+b+c": 64.5}))
    tuned = tune("basic", SPACE, fake, limits=Limits(1000))
    names = ("mode", "clip", "ends", "preset")
    assert fake.settings(*names)[:9] == [
        ("sym", "none", None, None),
        ("sym", "none", 8, "accurate"),  # all recipes
        ("sym", "auto", 8, "accurate"),  # settings, the first slowest
        ("asym_u", "none", 8, "accurate"),
        ("asym_u", "auto", 8, "accurate"),  # of equals the latest is the best so far
        ("asym_u", "auto", None, "accurate"),  # recipes one by one, always with the best so far
        ("asym_u", "auto", None, None),
        ("asym_u", "auto", None, "fast"),
        ("asym_u", "auto", None, "fast"),
    ]
    assert fake.raised[8:] == [
        *("c:8", "b:8", "a:8"),  # one at a time from the output
        *("a:8+c:8", "a:8+b:8+c:8"),  # together, the most helpful first
        *("a:8+b:8+c", "a:8+b+c:8", "a+b:8+c:8"),  # the next number of bits, from the best so far
        *("a:8+b+c", "a+b+c"),
    ]
    assert not tuned.met and tuned.why == "the strategy has tried all that it has"


def test_groups_that_helped_most_alone_come_first(tune, make_fake, by_groups):
    fake = make_fake(by_groups({"": 60.0, "a": 62.0, "b": 63.0, "c": 61.0}))
    tune("basic", Space(groups=("a", "b", "c")), fake)
    assert fake.raised == ["", "c", "b", "a", "a+b", "a+b+c"]


def test_it_ends_with_the_first_that_meets_the_goal(tune, make_fake):
    fake = make_fake(lambda c: 69.5 if dict(c.settings)["preset"] == "accurate" else 60.0)
    tuned = tune("basic", SPACE, fake)
    assert len(fake.trials) == 2 and tuned.met and tuned.best.number == 2


def test_a_space_with_nothing_in_it_is_one_trial(tune, make_fake):
    fake = make_fake(lambda c: 60.0)
    assert tune("basic", Space(), fake).trials == 1 and len(fake.asked) == 1
