"""Who does independent tasks: this process, local processes, or a Ray cluster."""

from qtool.search.workers.crews import Crew, Make
from qtool.search.workers.local import LocalCrew
from qtool.search.workers.pool import Pool
from qtool.search.workers.ray_cluster import RayCrew

__all__ = ["Crew", "LocalCrew", "Make", "Pool", "RayCrew"]
