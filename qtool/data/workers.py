"""Call a function on many items in several processes; the results come in the order of the items."""

import multiprocessing
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from qtool.data.pipes import receive, send
from qtool.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Traceback(str):
    """What a worker sends when the function raised."""


def ordered_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield function(item) for each item, worked out by processes that stay one or two results ahead.

    Worker k works out items k, k + workers, and so on, and has a pipe of its own: a worker that dies
    is noticed at once. Nothing travels through shared memory, as it does in torch's DataLoader, so
    neither that nor the number of open files limits the size of a result.

    Args:
        function: what to call; it uses one thread, and is picklable where processes are not forked.
        items: what to call it on.
        workers: how many processes; 0 calls the function in this one.

    Yields:
        The results, in the order of items. They are pickled, so they should hold arrays, not tensors.

    Raises:
        DataError: if a worker dies, or cannot be started.
        RuntimeError: if function raises in a worker; the text is its traceback.
    """
    workers = min(workers, len(items))
    if workers == 0:
        yield from map(function, items)
        return
    started: list[tuple[BaseProcess, Connection]] = []
    try:
        with _uninterrupted():
            for k in range(workers):
                started.append(_start(function, items[k::workers]))
        for position in range(len(items)):
            yield _receive(*started[position % workers])
    finally:
        for process, connection in started:
            process.kill()
            process.join()
            connection.close()


def _start(function: Callable[[Item], Result], items: Sequence[Item]) -> tuple[BaseProcess, Connection]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_work, args=(sender, function, items), daemon=True)
    try:
        process.start()
    except OSError as error:
        receiver.close()
        raise DataError(
            f"no process can be started that reads images: {error}; use fewer --workers"
        ) from error
    finally:
        sender.close()  # so that the pipe ends when the worker does
    return process, receiver


def _work(sender: Connection, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
    """What a worker does; it leaves Ctrl-C, which a terminal sends to every process, to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for item in items:
            send(sender, function(item))
    except BrokenPipeError:  # the parent is gone
        return
    except Exception:
        send(sender, _Traceback(traceback.format_exc()))


def _receive(process: BaseProcess, connection: Connection) -> Any:
    try:
        received = receive(connection)
    except (EOFError, OSError) as error:
        process.join()
        code = process.exitcode or 0
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise DataError(
            f"a process that reads images ended early ({cause}); "
            "if memory ran out, use fewer --workers or a smaller --batch-size"
        ) from error
    if isinstance(received, _Traceback):
        raise RuntimeError(f"in a process that reads images:\n{received}")
    return received


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends; processes forked in it take the waiting handler along."""
    interrupts: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: forking with threads
        if threading.current_thread() is not threading.main_thread():  # only that one handles signals
            yield
            return
        handler = signal.signal(signal.SIGINT, lambda number, _frame: interrupts.append(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
    if interrupts:
        signal.raise_signal(signal.SIGINT)
