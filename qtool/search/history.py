"""The history of a tuning: an SQLite file with every trial, from which it goes on where it was.

Each trial is one transaction, so a process that is killed at any moment leaves the trials that had ended, and
nothing else. A file holds one tuning: what all its numbers depend on is stored with it and compared.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qtool.errors import ConfigError, OutputError
from qtool.search.outcomes import Outcome
from qtool.search.space import Candidate, Proposal, canonical

# "qtun", by which SQLite's file format names the program that a file belongs to.
APPLICATION = 0x7174756E
FORMAT = 1
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (name TEXT PRIMARY KEY, content BLOB NOT NULL);
CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    stage TEXT NOT NULL,
    config TEXT NOT NULL,
    settings TEXT NOT NULL,
    result TEXT NOT NULL,
    failure TEXT NOT NULL,
    seconds REAL NOT NULL,
    seed INTEGER NOT NULL,
    versions TEXT NOT NULL,
    ended TEXT NOT NULL
);
"""
INPUTS = "inputs"
# A reader may hold the file for a moment.
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Entry:
    """A trial or probe of a history.

    Args:
        number: from 1 on, in the order in which they ended.
        proposal: what was asked.
        outcome: what was measured.
        settings: all those of a run that does the same, as the text of a YAML file.
        seed: of the run.
        versions: of the programs that measured it.
        ended: date and time, UTC.
    """

    number: int
    proposal: Proposal
    outcome: Outcome
    settings: str
    seed: int
    versions: Mapping[str, str]
    ended: str


class History:
    """An open history; see open_history.

    Attributes:
        path: the file.
        taken: how many entries were there when it was opened.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._entries = {entry.proposal.key: entry for entry in _read_entries(connection)}
        self.taken = len(self._entries)

    def find(self, proposal: Proposal) -> Entry | None:
        """What was measured for a proposal, if it was."""
        return self._entries.get(proposal.key)

    def entries(self) -> list[Entry]:
        """All, by number."""
        return sorted(self._entries.values(), key=lambda entry: entry.number)

    def add(
        self,
        proposal: Proposal,
        outcome: Outcome,
        settings: str = "",
        seed: int = 0,
        versions: Mapping[str, str] = MappingProxyType({}),
    ) -> Entry:
        """Keep what was measured.

        Raises:
            OutputError: if it cannot be written, or another process writes to the file.
        """
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        entry = Entry(len(self._entries) + 1, proposal, outcome, settings, seed, dict(versions), ended)
        row = (
            entry.number,
            proposal.key,
            proposal.kind,
            proposal.stage,
            canonical(proposal.plain()),
            settings,
            canonical(_finite(outcome.values)),
            outcome.failure,
            outcome.seconds,
            seed,
            canonical(entry.versions),
            ended,
        )
        with self._writing():
            self._connection.execute(f"INSERT INTO trials VALUES ({', '.join('?' * len(row))})", row)
        self._entries[proposal.key] = entry
        return entry

    def fact(self, name: str) -> Any:
        """A stored fact; None if there is none."""
        return _fact(self._connection, name)

    def put_fact(self, name: str, value: Any) -> None:
        """Store a fact, plain data, in place of one of its name."""
        with self._writing():
            self._connection.execute("REPLACE INTO facts VALUES (?, ?)", (name, canonical(value)))

    def files(self) -> dict[str, bytes]:
        """The stored files by name."""
        return {name: bytes(content) for name, content in self._connection.execute("SELECT * FROM files")}

    def put_files(self, files: Mapping[str, bytes]) -> None:
        """Store files, all or none."""
        with self._writing():
            self._connection.executemany("REPLACE INTO files VALUES (?, ?)", files.items())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._connection:
                yield
        except sqlite3.IntegrityError as error:
            raise OutputError(
                f"{self.path}: another tuning writes to it; end one of the two, or give it another --history"
            ) from error
        except sqlite3.Error as error:
            raise OutputError(f"{self.path}: cannot be written: {error}") from error


@contextmanager
def open_history(path: Path, inputs: Mapping[str, Any]) -> Iterator[History]:
    """A history to go on with, or a new one.

    Args:
        path: the file; made if there is none.
        inputs: all that the numbers depend on, as plain values.

    Raises:
        ConfigError: if the file is no history, is damaged, or is of a tuning with other inputs.
        OutputError: if it cannot be made.
    """
    new = not path.exists()
    try:
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PATIENCE_S)
    except (OSError, sqlite3.Error) as error:
        raise OutputError(f"{path}: cannot be made: {error}") from error
    with closing(connection):
        _check(path, connection, may_be_new=True)
        if _is_empty(path, connection):
            _create(path, connection, inputs)
        with _reading(path):
            _check_inputs(path, _fact(connection, INPUTS), json.loads(canonical(inputs)))
            history = History(path, connection)
        yield history


@contextmanager
def read_history(path: Path) -> Iterator[History]:
    """A history to look at, which may be written by a tuning at the same time.

    Raises:
        ConfigError: if there is none, or the file is none or is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; the history of a tuning lies in its run's folder")
    # What a killed process has left half-written is rolled back, for which the file has to be writable.
    mode = "rw" if os.access(path, os.W_OK) else "ro"
    with _reading(path):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=PATIENCE_S)
    with closing(connection):
        _check(path, connection, may_be_new=False)
        with _reading(path):
            history = History(path, connection)
        yield history


def _check(path: Path, connection: sqlite3.Connection, may_be_new: bool) -> None:
    with _reading(path):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION and version == FORMAT:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
            return
    if application == APPLICATION:
        raise ConfigError(
            f"{path}: a history of format {version}, and this qtool reads format {FORMAT}; use the qtool "
            "that wrote it, or name another file"
        )
    if not (may_be_new and _is_empty(path, connection)):
        raise ConfigError(f"{path}: not the history of a tuning; name another file")


def _is_empty(path: Path, connection: sqlite3.Connection) -> bool:
    with _reading(path):
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return int(tables) == 0


def _create(path: Path, connection: sqlite3.Connection, inputs: Mapping[str, Any]) -> None:
    """All of it or nothing, so that a process which is killed here leaves an empty file."""
    try:
        (value,) = connection.execute("SELECT quote(?)", (canonical(inputs),)).fetchone()
        connection.executescript(
            f"BEGIN; {SCHEMA} INSERT INTO facts VALUES ('{INPUTS}', {value});"
            f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {FORMAT}; COMMIT;"
        )
    except sqlite3.Error as error:
        raise OutputError(f"{path}: cannot be made: {error}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path}: cannot be read as the history of a tuning ({reason}); it is left as it is: name "
            "another file, or put back a copy"
        ) from error


def _check_inputs(path: Path, before: Any, now: Mapping[str, Any]) -> None:
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        raise ConfigError(
            f"{path}: is of a tuning with other {', '.join(different)}; repeat the command that made it, or "
            "name another file"
        )


def _fact(connection: sqlite3.Connection, name: str) -> Any:
    row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])


def _read_entries(connection: sqlite3.Connection) -> Iterator[Entry]:
    columns = "number, kind, stage, config, settings, result, failure, seconds, seed, versions, ended"
    for row in connection.execute(f"SELECT {columns} FROM trials ORDER BY number"):
        number, kind, stage, config, settings, result, failure, seconds, seed, versions, ended = row
        tree = json.loads(config)
        proposal = Proposal(Candidate.from_plain(tree), kind, tuple(tree["images"]), stage)
        outcome = Outcome(_infinite(json.loads(result)), seconds, failure)
        yield Entry(number, proposal, outcome, settings, seed, json.loads(versions), ended)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: such a number becomes a string."""
    return {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _infinite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(v) if v in ("inf", "-inf", "nan") else v for k, v in values.items()}
