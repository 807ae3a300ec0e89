"""How long networks take, side by side: in turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

WARM_UP = 2
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """How long a network takes for a batch.

    Args:
        images: in the batch.
        seconds: of each round.
    """

    images: int
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle of the rounds, milliseconds for a batch."""
        return 1000 * median(self.seconds)

    @property
    def p90_ms(self) -> float:
        """What nine of ten rounds stay below, milliseconds for a batch."""
        if len(self.seconds) < 2:
            return 1000 * self.seconds[0]
        return 1000 * quantiles(self.seconds, n=10, method="inclusive")[-1]

    @property
    def images_per_second(self) -> float:
        """Images in a second, in the median round."""
        return self.images / median(self.seconds)


def time_in_turns(
    networks: Mapping[str, Callable[[Tensor], object]], x: Tensor, seconds: float
) -> dict[str, Timing]:
    """Run networks on a batch, one after the other, round after round.

    Args:
        networks: by name.
        x: the batch.
        seconds: no round is begun later than this after the first; LEAST_ROUNDS are made in any case.
    """
    found: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for _ in range(WARM_UP):
            for network in networks.values():
                network(x)
        start = time.perf_counter()
        rounds = 0
        while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
            for name, network in networks.items():
                before = time.perf_counter()
                network(x)
                found[name].append(time.perf_counter() - before)
            rounds += 1
    return {name: Timing(len(x), tuple(times)) for name, times in found.items()}


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def added_memory_mib(network: Callable[[Tensor], object], x: Tensor) -> float | None:
    """What one pass adds to the memory of the process at its peak, MiB; None where Linux does not tell.

    Freed memory that the C library has kept is given back before.

    Args:
        network: that takes the batch.
        x: the batch.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # the peak begins anew
        before = _status_mib("VmRSS")
        with torch.no_grad():
            network(x)
        return max(0.0, _status_mib("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status_mib(key: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024
