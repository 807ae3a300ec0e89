"""The journal of a search."""

import json
import math

import pytest

from qtool.errors import ConfigError
from qtool.search.journal import open_journal, read_journal


def test_numbers_are_kept_exactly(tmp_path):
    path = tmp_path / "j"
    numbers = [0.1, 1e-320, math.pi, -0.0, float("inf")]
    with open_journal(path, {"seed": 0}) as journal:
        assert journal("a", lambda: numbers) == numbers
    (found,) = read_journal(path, {"seed": 0}).values()
    assert [v.hex() for v in found] == [v.hex() for v in numbers]


def test_a_known_name_is_not_computed(tmp_path):
    with open_journal(tmp_path / "a", {}) as journal:
        journal("x", lambda: [1.0])
        assert journal("x", lambda: pytest.fail("computed")) == [1.0]
        assert (journal.computed, journal.taken) == (1, 0)
    with open_journal(tmp_path / "b", {}, tmp_path / "a") as journal:
        assert journal("x", lambda: pytest.fail("computed")) == [1.0]
        journal("y", lambda: [2.0])
        assert (journal.computed, journal.taken) == (1, 1)
    assert read_journal(tmp_path / "b", {}) == {"x": [1.0], "y": [2.0]}


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    with open_journal(tmp_path / "j", {}) as journal:
        journal("x", lambda: [1.0])
        journal("y", lambda: [2.0])
    text = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(text[:-9])
    assert read_journal(tmp_path / "j", {}) == {"x": [1.0]}


def test_other_inputs_are_named(tmp_path):
    with open_journal(tmp_path / "j", {"seed": 0, "images": [3, "a"]}):
        pass
    with pytest.raises(ConfigError, match="other images, device; resume it with the settings of its config"):
        read_journal(tmp_path / "j", {"seed": 0, "images": [4, "a"], "device": "cpu"})


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", '{"inputs": {}}\n{"name": "x"}\n', "no\n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "j").write_text(text)
    with pytest.raises(ConfigError, match="not the journal of a search"):
        read_journal(tmp_path / "j", {})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no search to resume"):
        read_journal(tmp_path / "none", {})


def test_a_journal_is_lines_of_json(tmp_path):
    with open_journal(tmp_path / "j", {"seed": 1}) as journal:
        journal("x", lambda: [0.5])
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert lines == [{"inputs": {"seed": 1}}, {"name": "x", "values": ["0x1.0000000000000p-1"]}]
