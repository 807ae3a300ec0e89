"""Candidates and proposals are plain data."""

from qtool.search.space import CONFIRM, PROBE, Candidate, Dimension, Proposal, Space


def test_a_candidate_comes_back_from_json():
    one = Candidate.of({"b": None, "a": "asym_u"}, {"fc": 0, "conv1": 8})
    assert Candidate.from_plain(one.plain()) == one
    assert one.settings == (("a", "asym_u"), ("b", None))


def test_a_key_tells_what_is_measured_apart_and_not_why():
    one = Candidate.of({"mode": "sym"})
    keys = {Proposal(one).key, Proposal(one, PROBE, (1, 2)).key, Proposal(one, CONFIRM).key}
    keys |= {Proposal(one.with_raised("fc", bits=0)).key, Proposal(one.with_setting("mode", "asym_u")).key}
    assert len(keys) == 5
    assert Proposal(one, stage="start").key == Proposal(one, stage="later").key


def test_a_key_does_not_change_between_programs():
    key = Proposal(Candidate.of({"mode": "sym"}, {"fc": 8})).key
    assert key == "f1d48beec2bdba89ded710bbffb359cafcdda39f927e5cbb437838cc1e24ce4d"


def test_the_start_is_the_first_option_everywhere():
    space = Space((Dimension("mode", ("sym", "asym_u")), Dimension("preset", (None, "fast"), recipe=True)))
    assert dict(space.start.settings) == {"mode": "sym", "preset": None}
    assert [d.name for d in space.choices] == ["mode"] and [d.name for d in space.recipes] == ["preset"]
