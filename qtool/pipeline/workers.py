"""The settings of a run in a process that works for another."""

from __future__ import annotations

from dataclasses import replace

from qtool.config import Config


def for_worker(config: Config) -> Config:
    """The settings for a worker, which has no children and shows no bars."""
    return replace(config, data=replace(config.data, workers=0, print_freq=1 << 30))
