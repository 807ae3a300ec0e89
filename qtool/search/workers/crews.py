"""What a pool needs of its workers."""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qtool.errors import QtoolError

# Makes, in a worker, the function that does its tasks; it travels to the worker by pickle.
Make = Callable[[], Callable[[Any], Any]]


@dataclass(frozen=True)
class Reply:
    """What a worker says of a task.

    Args:
        worker: its number.
        value: the result, None on failure.
        problem: what the user can fix, if that came up.
        bug: the traceback of anything else, or "".
        death: how the worker died, if it did, in words, or "".
    """

    worker: int
    value: Any = None
    problem: QtoolError | None = None
    bug: str = ""
    death: str = ""


class Crew(Protocol):
    """Some workers, each of which does one task at a time."""

    size: int

    def begin(self, worker: int, task: Any) -> None:
        """Give a task to a worker that has none; it is started if it is not there."""

    def wait(self) -> list[Reply]:
        """What came in, after waiting for it if need be."""

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does; the next task starts another in its place."""

    def close(self) -> None:
        """End all of them."""


def prepare(threads: int) -> None:
    """Make this process a worker: its own number of threads, no messages, and deaf to Ctrl-C."""
    torch.set_num_threads(threads)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it is told, and ends it
    log = logging.getLogger("qtool")
    log.addHandler(logging.NullHandler())
    log.propagate = False


def done(worker: int, work: Callable[[], Any]) -> Reply:
    """Do something and say how it went."""
    try:
        return Reply(worker, work())
    except QtoolError as error:
        return Reply(worker, problem=error)
    except Exception:  # a bug, which is said in the process that the user sees
        return Reply(worker, bug=traceback.format_exc())
