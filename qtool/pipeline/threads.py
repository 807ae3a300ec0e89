"""Several pieces of work at once, each on a share of the threads that torch has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def run_in_threads(work: Callable[..., object], arguments: Iterable[tuple[Any, ...]], most: int) -> None:
    """Call a function with each of some arguments, several calls at once.

    The arguments are taken as they are needed, in this thread.

    Args:
        work: what is called; a thread has torch's defaults, not the caller's no_grad.
        arguments: of each call.
        most: calls at once, at most; no more than torch has threads.

    Raises:
        Exception: that of the first call that failed, in the order of the arguments; calls that are
            running then are waited for.
    """
    threads = torch.get_num_threads()
    together = min(most, threads)
    if together <= 1:
        for values in arguments:
            work(*values)
        return
    torch.set_num_threads(threads // together)
    running: deque[Future[object]] = deque()
    try:
        with ThreadPoolExecutor(
            together, initializer=torch.set_num_threads, initargs=(threads // together,)
        ) as pool:
            for values in arguments:
                if len(running) == together:
                    running.popleft().result()
                running.append(pool.submit(work, *values))
            for call in running:
                call.result()
    finally:
        torch.set_num_threads(threads)
