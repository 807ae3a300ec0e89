"""Which records of a statistics file are looked at: some layers' tensors, each of them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qtool.config.layers import matching, split_patterns
from qtool.errors import ConfigError
from qtool.observers.stats import ActivationStats, ModelStats

# What a record says of a tensor, whatever shape its reader gives it.
STATISTICS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")


def of_layers(patterns: Sequence[str], *files: ModelStats) -> list[ModelStats]:
    """The statistics of the layers that match one of the patterns, in each file's order; all without any.

    Raises:
        ConfigError: if a pattern is no regular expression, or matches nothing in any file, with the nearest
            names.
    """
    if not patterns:
        return list(files)
    names = list(dict.fromkeys(name for stats in files for name in stats.layers))
    advice = "'qtool stats show' lists the layers of a file"
    try:
        wanted = {name for p in split_patterns(patterns) for name in matching(p, names, advice)}
    except ConfigError as error:
        raise ConfigError(f"--layer: {error}") from error
    return [
        replace(stats, layers={name: layer for name, layer in stats.layers.items() if name in wanted})
        for stats in files
    ]


def produced(stats: ModelStats) -> set[tuple[Any, ...]]:
    """The statistics of all outputs; an input with the same ones is a layer's output."""
    return {values(layer.output) for layer in stats.layers.values() if layer.output is not None}


def values(record: ActivationStats) -> tuple[Any, ...]:
    """What a record says of its values: equal for a tensor under another name or in another shape."""
    return tuple(getattr(record, name) for name in (*STATISTICS, "total_numel"))
