"""Exhaustive and random: all of it, lazily."""

import pytest

from qtool.search.space import Dimension, Finding, Proposal, Space
from qtool.search.strategies import STRATEGIES
from qtool.search.tuner import Limits

SMALL = Space((Dimension("mode", ("sym", "asym_u")),), ("a", "b"), (8, 0))
# More candidates than there are atoms.
HUGE = Space(
    tuple(Dimension(f"d{i}", tuple(range(9))) for i in range(20)), tuple(f"g{i}" for i in range(200))
)
ALL = 2 * 3 * 3


def test_exhaustive_tries_everything_once_fewest_groups_first(tune, make_fake):
    fake = make_fake(lambda c: 60.0)
    tuned = tune("exhaustive", SMALL, fake)
    assert tuned.trials == len(set(fake.trials)) == ALL
    counts = [len(c.raised) for c in fake.trials]
    assert counts == sorted(counts) and fake.trials[0] == SMALL.start


def test_random_tries_nothing_twice_and_ends_when_nothing_is_left(tune, make_fake):
    fake = make_fake(lambda c: 60.0)
    tuned = tune("random", SMALL, fake)
    assert tuned.trials == len(set(fake.trials)) == ALL and fake.trials[0] == SMALL.start


@pytest.mark.parametrize("name", ["exhaustive", "random"])
def test_the_product_is_never_made(tune, make_fake, name):
    fake = make_fake(lambda c: 60.0)
    assert tune(name, HUGE, fake, limits=Limits(50)).trials == 50


def test_draws_depend_on_the_seed_alone():
    def candidates(seed: int) -> list[object]:
        steps = STRATEGIES["random"](HUGE, seed)
        batches = [next(steps), *(steps.send([Finding(Proposal(HUGE.start))]) for _ in range(3))]
        return [p.candidate for batch in batches for p in batch]

    assert candidates(1) == candidates(1) != candidates(2)


def test_half_of_the_draws_leave_all_groups_as_they_are(tune, make_fake):
    fake = make_fake(lambda c: 60.0)
    tune("random", HUGE, fake, limits=Limits(401))
    untouched = sum(not c.raised for c in fake.trials)
    assert 160 < untouched < 240
