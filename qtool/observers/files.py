"""Statistics on disk: a YAML file, and a binary one beside it that its header names by hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qtool.errors import StatsError
from qtool.observers.sidecar import to_bytes, with_details
from qtool.observers.stats import ModelStats
from qtool.observers.stats_yaml import Link, parse_stats, write_stats


def read_stats(path: Path) -> ModelStats:
    """Read a stats YAML, and the file of histograms that it names, where that lies beside it.

    A YAML that was moved without it is read all the same; what needs a histogram then says that there is
    none.

    Raises:
        StatsError: if a file cannot be read or holds something else, or if the file of histograms is not
            the one that was written with the YAML.
    """
    stats, link = _parsed(path)
    if link is None:
        return stats
    beside = path.parent / link.file
    try:
        content = beside.read_bytes()
    except FileNotFoundError:
        return stats
    except OSError as error:
        raise StatsError(f"{beside}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != link.sha256:
        raise StatsError(
            f"{beside}: does not belong to {path}, whose histograms have another hash; "
            "put back the one that was written with it, or run 'qtool calibrate' again"
        )
    return with_details(stats, content, str(beside))


def histograms_of(path: Path) -> Path | None:
    """Where the file of histograms of a stats YAML belongs, whether it is there or not; None if it has none.

    Raises:
        StatsError: if the YAML cannot be read or holds something else.
    """
    _, link = _parsed(path)
    return None if link is None else path.parent / link.file


def _parsed(path: Path) -> tuple[ModelStats, Link | None]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StatsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StatsError(f"{path}: not a text file; a stats YAML is wanted") from error
    return parse_stats(text, str(path))


def file_contents(stats: ModelStats, histograms: str) -> tuple[str, bytes | None]:
    """The text of the YAML and the content of the file of histograms, which it calls `histograms`."""
    content = to_bytes(stats)
    link = None if content is None else Link(histograms, hashlib.sha256(content).hexdigest())
    return write_stats(stats, link), content
