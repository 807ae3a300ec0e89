"""The history of a tuning, a file that nothing may damage."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from qtool.errors import ConfigError, OutputError
from qtool.search.history import open_history, read_history
from qtool.search.outcomes import Outcome
from qtool.search.space import PROBE, Candidate, Proposal

INPUTS = {"network": ["digits_resnet", "abc"], "seed": 0}
VERSIONS = {"torch": "2.0"}


def proposal(number: int) -> Proposal:
    return Proposal(Candidate.of({"number": number}, {"fc": 0}), stage="start")


def test_entries_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "tuning.db"
    values = {"top1": 0.1 + 0.2, "error": math.inf, "worst": [3, 1], "engine": "int8"}
    probe = Proposal(Candidate.of({"a": None}), PROBE, (4, 2), "probe a")
    with open_history(path, INPUTS) as history:
        history.add(proposal(1), Outcome(values, 1.5), "mode: sym", 7, VERSIONS)
        history.add(probe, Outcome(failure="refused"), "", 7, VERSIONS)
    with open_history(path, INPUTS) as again:
        one, other = again.entries()
        assert again.taken == 2 and again.find(proposal(1)) == one
    assert one.proposal == proposal(1) and one.proposal.stage == "start"
    assert one.outcome == Outcome(values, 1.5) and one.settings == "mode: sym"
    assert (one.number, one.seed, one.versions) == (1, 7, VERSIONS)
    assert other.proposal == probe and other.outcome.failure == "refused"


def test_facts_and_files_come_back(tmp_path):
    with open_history(tmp_path / "t.db", INPUTS) as history:
        assert history.fact("float") is None and history.files() == {}
        history.put_fact("float", {"top1": 70.0})
        history.put_files({"stats.yaml": b"a\0b", "empty": b""})
    with read_history(tmp_path / "t.db") as history:
        assert history.fact("float") == {"top1": 70.0}
        assert history.files() == {"stats.yaml": b"a\0b", "empty": b""}


def test_a_history_of_other_inputs_is_refused_by_name(tmp_path):
    with open_history(tmp_path / "t.db", INPUTS):
        pass
    with (
        pytest.raises(ConfigError, match=r"t\.db: is of a tuning with other seed;"),
        open_history(tmp_path / "t.db", {**INPUTS, "seed": 1}),
    ):
        pass


def _foreign(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()


def _damaged(path):
    with open_history(path, INPUTS) as history:
        for number in range(200):
            history.add(proposal(number), Outcome({"top1": 1.0}))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = b"\xff" * 9000
    path.write_bytes(content)


def _shortened(path):
    with open_history(path, INPUTS) as history:
        history.put_files({"big": b"x" * 50_000})
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("no database at all, but long enough to be looked at\n" * 99),
        _foreign,
        _damaged,
        _shortened,
    ],
)
def test_a_foreign_or_damaged_file_is_one_line_and_stays_as_it_was(tmp_path, spoil):
    path = tmp_path / "t.db"
    spoil(path)
    before = path.read_bytes()
    for opened in (lambda: open_history(path, INPUTS), lambda: read_history(path)):
        with pytest.raises(ConfigError) as error, opened():
            pass
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_newer_format_is_refused(tmp_path):
    with open_history(tmp_path / "t.db", INPUTS):
        pass
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="a history of format 99"), read_history(tmp_path / "t.db"):
        pass


def test_there_has_to_be_one_to_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.db: no such file"), read_history(tmp_path / "none.db"):
        pass
    (tmp_path / "empty.db").touch()
    with pytest.raises(ConfigError, match="not the history"), read_history(tmp_path / "empty.db"):
        pass


def test_an_empty_file_is_a_history_that_was_killed_at_its_start(tmp_path):
    (tmp_path / "t.db").touch()
    with open_history(tmp_path / "t.db", INPUTS) as history:
        assert history.entries() == []


def test_a_second_tuning_on_the_same_file_is_told(tmp_path):
    with open_history(tmp_path / "t.db", INPUTS) as one, open_history(tmp_path / "t.db", INPUTS) as other:
        one.add(proposal(1), Outcome())
        with pytest.raises(OutputError, match="another tuning writes to it"):
            other.add(proposal(2), Outcome())


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"), open_history(tmp_path / "file" / "t.db", INPUTS):
        pass


WRITER = """
import itertools, sys
from pathlib import Path
from qtool.search.history import open_history
from qtool.search.outcomes import Outcome
from qtool.search.space import Candidate, Proposal

with open_history(Path(sys.argv[1]), {"a": 1}) as history:
    print(history.taken, flush=True)
    for number in itertools.count(history.taken):
        history.add(Proposal(Candidate.of({"n": number})), Outcome({"top1": 1.0, "worst": [1] * 500}))
        print(number, flush=True)
"""


def test_what_was_said_to_be_written_outlives_kills_at_any_moment(tmp_path):
    path = tmp_path / "t.db"
    for pause in (0.0, 0.05, 0.1, 0.17, 0.23):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        before = int(process.stdout.readline())
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        with read_history(path) as history:
            found = [dict(e.proposal.candidate.settings)["n"] for e in history.entries()]
        assert found == list(range(len(found))) and len(found) >= max([before, *(n + 1 for n in said)])
