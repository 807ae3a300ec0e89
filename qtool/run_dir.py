"""The folder a run writes. Every file lands whole or not at all."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from qtool.errors import OutputError

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file beside its final place, then move it there; on any error nothing is left.

    Args:
        path: where the file is to be; an existing one is replaced.
        write: is given the open binary file.

    Raises:
        OutputError: if the folder or the file cannot be written, or the disk is full.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; the result follows the user's own settings.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # torch's zip writer reports a full disk so
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"{path}: cannot be written; is the disk full? ({reason})") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole, in UTF-8."""
    return write_whole(path, lambda file: file.write(text.encode("utf-8")))


def check_writable(path: Path) -> None:
    """Find out, before the work that gives its content, that a file cannot be written.

    Raises:
        OutputError: if it is a folder, or no files can be made where it is to be.
    """
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder; name a file in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise OutputError(f"{path}: cannot be written: no files can be made in {above}; choose another place")


def make_run_dir(out_dir: Path, name: str | None = None) -> Path:
    """A new folder `[name___]YYYY.MM.DD-HHMMSS` in out_dir; a number is added if there is one.

    Raises:
        OutputError: if it cannot be made.
    """
    stamp = time.strftime("%Y.%m.%d-%H%M%S")
    base = f"{name}___{stamp}" if name else stamp
    for attempt in range(1000):
        path = out_dir / (base if attempt == 0 else f"{base}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if out_dir.is_dir():
                continue
            raise OutputError(f"{out_dir}: is a file; choose another folder with --out-dir") from None
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be made: {error.strerror}; choose another folder with --out-dir"
            ) from error
        return path
    raise OutputError(f"{out_dir}: has too many runs of this second")


class _LogFile(logging.FileHandler):
    """A log that cannot be written ends the run, in place of a traceback for every message."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._path = path
        self.setFormatter(logging.Formatter(LOG_FORMAT))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def log_to(path: Path, logger: logging.Logger) -> Iterator[None]:
    """Copy a logger's messages to a file while the `with` block runs.

    Raises:
        OutputError: if the file cannot be opened.
    """
    try:
        handler = _LogFile(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # of a disk that is full, which has been reported
            handler.close()
