"""The processes that share one run, as torchrun starts them: each takes every so-manieth chunk or batch.

All of them open the same inputs and end with the same results; the first writes and speaks. Whatever a
process computes alone is exchanged as Python values between the processes of this run, which the
user started together.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed

from qtool.errors import ConfigError, ProcessEnded, QtoolError, ShareError
from qtool.launch import launched

LOG = logging.getLogger("qtool")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Args:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work on this process' share: an error in it says which process had it."""
        try:
            yield
        except ProcessEnded:
            raise
        except QtoolError as error:
            if self.size == 1:
                raise
            raise ShareError(f"process {self.rank + 1} of {self.size}: {error}") from error

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their numbers.

        Raises:
            ProcessEnded: if one has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _others_may_end():
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, value: T | None) -> T:
        """The value of the first process; what the others give is ignored.

        Raises:
            ProcessEnded: if it has ended.
        """
        found: list[Any] = [value]
        if self.size > 1:
            with _others_may_end():
                distributed.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[no-any-return]


ALONE = Ranks()


@contextmanager
def _others_may_end() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessEnded("another process of this run has ended; its own message says why") from error


def _end(_number: int, _frame: FrameType | None) -> None:
    raise ProcessEnded("ended because another process of this run has failed")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes of a run, if it has any.

    Args:
        device: where networks run; processes on GPUs exchange through nccl, others through gloo.

    Raises:
        ConfigError: if they cannot be reached.
    """
    if launched() == 1:
        yield ALONE
        return
    # torchrun sends this to the others when one process has failed; what is unfinished is cleaned up.
    signal.signal(signal.SIGTERM, _end)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes of this run cannot reach each other: {str(error).splitlines()[0]}"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
