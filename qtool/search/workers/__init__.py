"""Who does independent tasks: this process, local processes, or a Ray cluster."""

import torch

from qtool.search.workers.crews import Crew, Make
from qtool.search.workers.local import LocalCrew
from qtool.search.workers.pool import Pool
from qtool.search.workers.ray_cluster import RayCrew, load_ray

__all__ = ["RAY", "Crew", "LocalCrew", "Make", "Pool", "RayCrew", "crew_of", "load_ray"]

RAY = "ray"


def crew_of(workers: str, make: Make) -> Crew | None:
    """The workers that --workers asks for.

    Args:
        workers: `N`, `ray` or `ray:N`, see config.options.WorkersOf.
        make: makes the function that does tasks.

    Returns:
        None for one worker, which is this process.

    Raises:
        ConfigError: if a Ray cluster cannot be had.
    """
    kind, _, count = workers.rpartition(":")
    if RAY in (kind, count):
        return RayCrew(int(count) if kind else None, make)
    if count == "1":
        return None
    return LocalCrew(int(count), make, max(1, torch.get_num_threads() // int(count)))
