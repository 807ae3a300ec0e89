"""What workers do in tests; a module of its own, which other processes can import."""

import os
import signal
import time
from pathlib import Path

from qtool.errors import DataError


def squares():
    """Makes a function that takes the longer, the smaller its argument is."""

    def square(x: int) -> int:
        time.sleep(0.05 * max(0, 4 - x))
        return x * x

    return square


def mortal(folder: Path, deaths: int):
    """Makes a function that kills its process so often over tasks called deadly."""

    def work(task: str) -> str:
        file = folder / task
        count = len(file.read_text()) if file.exists() else 0
        if task.startswith("deadly") and count < deaths:
            file.write_text("x" * (count + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{task} done"

    return work


def failing():
    """Makes a function that raises what its task says."""

    def work(task: str) -> str:
        if task == "user":
            raise DataError("images/1.png: unreadable; replace it")
        if task == "bug":
            raise KeyError("gone")
        return task

    return work
