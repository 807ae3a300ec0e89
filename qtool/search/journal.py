"""The journal of a search: what was computed, so that a search that was ended can go on.

A search is deterministic, given the numbers that it computes. The journal keeps these numbers, exact,
in the order in which they were found; a search that was killed starts again from its beginning,
reads them in place of computing them, and so comes back to where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qtool.errors import ConfigError, OutputError


class Journal:
    """Remembers named numbers; use as a function of a name and of what computes them.

    Args:
        known: from read_journal, or empty.
        file: takes a line for each name that is computed.

    Attributes:
        computed: how many numbers, or groups of them, were.
        taken: how many came from known.
    """

    def __init__(self, known: Mapping[str, Sequence[float]], file: IO[str]) -> None:
        self._values = dict(known)
        self._not_taken = set(known)
        self._file = file
        self.computed = self.taken = 0

    def __call__(self, name: str, compute: Callable[[], Sequence[float]]) -> Sequence[float]:
        if name in self._values:
            self.taken += name in self._not_taken
            self._not_taken.discard(name)
            return self._values[name]
        values = [float(v) for v in compute()]
        self.computed += 1
        self._values[name] = values
        _write_line(self._file, {"name": name, "values": [v.hex() for v in values]})
        return values


@contextmanager
def open_journal(path: Path, inputs: Mapping[str, Any], earlier: Path | None = None) -> Iterator[Journal]:
    """A new journal that takes over the entries of an earlier one.

    Args:
        path: of the new one.
        inputs: all that the numbers depend on, as plain values.
        earlier: a journal that must have the same inputs.

    Raises:
        ConfigError: if it is no journal, or has other inputs.
        OutputError: if the new one cannot be written.
    """
    known = {} if earlier is None else read_journal(earlier, inputs)
    try:
        with path.open("w", encoding="utf-8") as file:
            _write_line(file, {"inputs": inputs})
            for name, values in known.items():
                _write_line(file, {"name": name, "values": [v.hex() for v in values]})
            yield Journal(known, file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_line(file: IO[str], entry: Mapping[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()  # so that it outlives the process


def read_journal(path: Path, inputs: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of a journal by name; a last line that was not finished is left out.

    Raises:
        ConfigError: if it cannot be read, is no journal, or has other inputs.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        first, *entries = (json.loads(line) for line in lines)
        before = first["inputs"]
        known = {e["name"]: [float.fromhex(v) for v in e["values"]] for e in entries}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; no search to resume") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the journal of a search; no search to resume") from error
    now = json.loads(json.dumps(inputs))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        raise ConfigError(
            f"{path}: is of a search with other {', '.join(different)}; resume it with the settings of its "
            "config.yaml, or start a new one"
        )
    return known
