"""Bayesian optimization, where optuna is installed."""

import sys

import pytest

from qtool.errors import ConfigError
from qtool.search.space import Dimension, Space
from qtool.search.strategies import STRATEGIES
from qtool.search.tuner import Limits

SPACE = Space(
    (Dimension("mode", ("sym", "asym_u")), Dimension("clip", ("none", "auto", "mse"))), ("a", "b", "c", "d")
)


def test_without_optuna_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs optuna.*pip install 'qtool\[bayesian\]'"):
        next(STRATEGIES["bayesian"](SPACE, 0))


def test_it_finds_a_cheap_candidate_that_meets_the_goal(tune, make_fake):
    pytest.importorskip("optuna")

    def top1(candidate):
        settings = dict(candidate.settings)
        return 68.0 + (settings["mode"] == "asym_u") + (settings["clip"] == "mse") * 0.6

    fake = make_fake(top1)
    tuned = tune("bayesian", SPACE, fake, limits=Limits(80, at_goal=False))
    assert tuned.met and dict(tuned.best.proposal.candidate.settings) == {"mode": "asym_u", "clip": "mse"}
    assert len(tuned.best.proposal.candidate.raised) <= 1  # each would cost
    assert fake.trials[0] == SPACE.start


def test_it_ends_when_it_proposes_nothing_new(tune, make_fake):
    pytest.importorskip("optuna")
    space = Space((Dimension("mode", ("sym", "asym_u")),))
    assert tune("bayesian", space, make_fake(lambda c: 60.0)).trials == 2


def test_the_same_findings_give_the_same_proposals(tune, make_fake):
    pytest.importorskip("optuna")
    fakes = [make_fake(lambda c: 60.0 + len(c.raised)) for _ in range(2)]
    for number, fake in enumerate(fakes):
        tune("bayesian", SPACE, fake, limits=Limits(30), file=f"{number}.db")
    assert fakes[0].trials == fakes[1].trials and len(fakes[0].trials) > 12
