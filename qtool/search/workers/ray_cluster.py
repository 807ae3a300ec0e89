"""Workers that are actors of a Ray cluster: the one that RAY_ADDRESS names, else a local one."""

from __future__ import annotations

import importlib
import logging
import os
import re
from typing import Any

from qtool.errors import ConfigError
from qtool.search.workers.crews import Make, Reply, done, prepare

PIP = "pip install 'qtool[ray]'"


def load_ray() -> Any:
    """The module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--workers ray: needs Ray, which is not installed: {PIP}") from error


class RayCrew:
    """Actors, started when they are needed, with one processor each.

    Args:
        size: how many; None for one for each processor of the cluster.
        make: makes the function that does tasks, in each of them.

    Raises:
        ConfigError: if Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self, size: int | None, make: Make) -> None:
        self._ray = load_ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
            if "RAY_ADDRESS" in os.environ:
                del quiet["include_dashboard"]  # of a cluster that is there already
            try:
                self._ray.init(**quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"--workers ray: no cluster to be had: {reason}") from error
        self.size = size or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._make = self._ray.put(make)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}

    def begin(self, worker: int, task: Any) -> None:
        """Give a task to a worker that has none."""
        if worker not in self._actors:
            remote = self._ray.remote(num_cpus=1, max_restarts=0)(Actor)
            self._actors[worker] = remote.remote(worker, self._make)
        self._running[self._actors[worker].do.remote(task)] = worker

    def wait(self) -> list[Reply]:
        """Replies, and deaths of workers."""
        ready, _ = self._ray.wait(list(self._running))
        replies = []
        for reference in ready:
            worker = self._running.pop(reference)
            try:
                replies.append(self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                self._actors.pop(worker, None)
                replies.append(Reply(worker, death=_reason(error)))
        return replies

    def stop(self, worker: int) -> None:
        """End a worker."""
        self._running = {ref: number for ref, number in self._running.items() if number != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            self._ray.kill(actor)

    def close(self) -> None:
        """End all of them, and the cluster if it was started here."""
        for number in list(self._actors):
            self.stop(number)
        if self._started:
            self._ray.shutdown()


def _reason(error: Exception) -> str:
    """The line of Ray's message that says what happened: the last one, behind a traceback if there is one."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


class Actor:
    """One worker."""

    def __init__(self, number: int, make: Make) -> None:
        prepare(threads=1)
        self._number, self._make = number, make
        self._work: Any = None

    def do(self, task: Any) -> Reply:
        """Do one task."""

        def once() -> Any:
            self._work = self._work or self._make()
            return self._work(task)

        return done(self._number, once)
