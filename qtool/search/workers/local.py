"""Workers that are processes of this machine."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from qtool.search.workers.crews import Make, Reply, done, prepare

# A worker that is asked to end gets so long.
GRACE_S = 5.0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Any
    has_task: bool = False


class LocalCrew:
    """Processes, started when they are needed.

    Args:
        size: how many.
        make: makes the function that does tasks, in each of them.
        threads: of torch, in each of them.
    """

    def __init__(self, size: int, make: Make, threads: int) -> None:
        self.size = size
        self._make, self._threads = make, threads
        # Fresh processes: a copy of one whose torch has threads may hang.
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}

    def begin(self, worker: int, task: Any) -> None:
        """Give a task to a worker that has none."""
        if worker not in self._workers:
            mine, theirs = self._context.Pipe()
            # A daemon ends with this process, unless that is killed: then its pipe ends.
            process = self._context.Process(
                target=_serve, args=(worker, theirs, self._make, self._threads), daemon=True
            )
            process.start()
            theirs.close()
            self._workers[worker] = _Worker(process, mine)
        found = self._workers[worker]
        found.has_task = True
        with suppress(ConnectionError):  # wait finds that it has died
            found.pipe.send(task)

    def wait(self) -> list[Reply]:
        """Replies, and deaths of workers that had a task."""
        with_task = {n: w for n, w in self._workers.items() if w.has_task}
        connection.wait([w.pipe for w in with_task.values()])
        replies = []
        for number, worker in with_task.items():
            if not worker.pipe.poll():
                continue
            try:
                replies.append(worker.pipe.recv())
                worker.has_task = False
            except (EOFError, ConnectionError):
                worker.process.join(GRACE_S)
                replies.append(Reply(number, death=_how_it_ended(worker.process.exitcode)))
                self.stop(number)
        return replies

    def stop(self, worker: int) -> None:
        """End a worker."""
        found = self._workers.pop(worker, None)
        if found is None:
            return
        found.process.kill()
        found.process.join()
        found.pipe.close()

    def close(self) -> None:
        """End all of them."""
        for number in list(self._workers):
            self.stop(number)


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "its pipe was closed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _serve(number: int, pipe: Any, make: Make, threads: int) -> None:
    """Do tasks until the process that sends them is gone."""
    prepare(threads)
    work: Any = None
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return

        def once(task: Any = task) -> Any:
            nonlocal work
            work = work or make()
            return work(task)

        try:
            pipe.send(done(number, once))
        except OSError:
            return
