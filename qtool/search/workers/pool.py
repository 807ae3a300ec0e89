"""Tasks for several workers, and results in the order of the tasks, whoever is faster."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.errors import WorkerError
from qtool.search.workers.crews import Crew, Reply

# How often a task may be done again after the worker that did it has died.
RETRIES = 2


@dataclass(eq=False)
class _Job:
    task: Any
    reply: Reply | None = None
    worker: int | None = None
    deaths: int = 0


class Pool:
    """Does tasks with a crew.

    Args:
        crew: the workers.

    Example:
        Within a generator that is not read to its end, what has begun is stopped::

            with closing(pool.run(tasks)) as results:
                first = next(results)
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._busy: dict[int, _Job] = {}

    def run(self, tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """The results, in the order of the tasks; those behind the next one are worked on ahead.

        Raises:
            QtoolError: that a task has raised.
            WorkerError: if the worker of a task died RETRIES times more than once.
            RuntimeError: with the traceback of anything else.
        """
        jobs = [_Job(task) for task in tasks]
        try:
            for place, job in enumerate(jobs):
                while job.reply is None:
                    self._begin(jobs[place : place + 2 * self._crew.size])
                    for reply in self._crew.wait():
                        self._take(reply)
                yield _value(job.reply)
        finally:
            for job in jobs:
                if job.worker is not None:
                    self._crew.stop(job.worker)
                    del self._busy[job.worker]

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Give the first jobs that nobody does to workers that have none."""
        waiting = [job for job in jobs if job.reply is None and job.worker is None]
        idle = [number for number in range(self._crew.size) if number not in self._busy]
        for number, job in zip(idle, waiting, strict=False):
            self._crew.begin(number, job.task)
            job.worker, self._busy[number] = number, job

    def _take(self, reply: Reply) -> None:
        job = self._busy.pop(reply.worker)
        job.worker = None
        if not reply.death:
            job.reply = reply
            return
        job.deaths += 1
        if job.deaths > RETRIES:
            raise WorkerError(
                f"workers: one died {job.deaths} times over the same trial ({reply.death}); with fewer "
                "--workers each has more memory"
            )


def _value(reply: Reply) -> Any:
    if reply.problem is not None:
        raise reply.problem
    if reply.bug:
        raise RuntimeError(f"in a worker:\n{reply.bug}")
    return reply.value
