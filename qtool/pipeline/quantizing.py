"""From a float network to a quantized one: plainly, with LAPQ, or with corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from qtool.config import Config
from qtool.graph.fold import Folded
from qtool.numerics.spec import LayerSpec
from qtool.pipeline import steps
from qtool.pipeline.conversion import with_reduced_ranges
from qtool.pipeline.corrections import Corrections
from qtool.pipeline.corrections.run import correct, open_corrections
from qtool.pipeline.inputs import Images, Subject, open_calibration
from qtool.pipeline.ranges import Ranges, find_ranges, find_stats
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.pipeline.searches import Searched, SearchedOn, open_search, quantize_with_lapq
from qtool.pipeline.stats_files import STATS_FILE, save_stats
from qtool.quantizers.prepare import QuantizedModel


@dataclass(frozen=True)
class Quantization:
    """How a run quantizes, decided before any long work.

    Args:
        subject: the network.
        traced: the same, traced.
        ranges: where those of activations come from.
        searched_on: the images of LAPQ's trials; None without LAPQ.
        corrections: what is corrected; None for nothing.
        images: those that corrections look at; None without corrections.
    """

    subject: Subject
    traced: fx.GraphModule
    ranges: Ranges
    searched_on: SearchedOn | None = None
    corrections: Corrections | None = None
    images: Images | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantized network, and how it came about.

    Args:
        model: the network.
        specs: what was asked of each layer.
        record: what results.json says.
        searched: what LAPQ found; None without LAPQ.
        folded: the float network that was quantized, where corrections have changed it.
    """

    model: QuantizedModel
    specs: Mapping[str, LayerSpec]
    record: dict[str, Any] = field(default_factory=dict)
    searched: Searched | None = None
    folded: Folded | None = None


def open_quantization(
    config: Config, subject: Subject, traced: fx.GraphModule, evaluation: Images, ranks: Ranks = ALONE
) -> Quantization:
    """Open what a run needs to quantize.

    Raises:
        ConfigError: if settings are wrong, or do not go together.
    """
    corrections = open_corrections(config, traced, ranks)
    searches = config.lapq.enabled or corrections is not None
    ranges = find_ranges(config, subject, traced, evaluation, searches)
    searched_on = images = None
    if config.lapq.enabled:
        searched_on = open_search(config, subject, evaluation, ranges.calibration)
    if corrections is not None:
        images = ranges.calibration or open_calibration(config, subject, evaluation)
    return Quantization(subject, traced, ranges, searched_on, corrections, images)


def quantize_network(config: Config, asked: Quantization, folder: Path, ranks: Ranks = ALONE) -> Quantized:
    """Quantize; statistics that were measured are written to the run's folder."""
    if asked.corrections is not None:
        return _with_corrections(config, asked, folder)
    stats, calibration = find_stats(config, asked.traced, asked.ranges, folder, ranks)
    record: dict[str, Any] = {"calibration": calibration}
    if asked.searched_on is not None:
        assert stats is not None
        found = quantize_with_lapq(config, folder, asked.subject, asked.traced, stats, asked.searched_on)
        done = Quantized(found.model, found.specs, record, found)
    else:
        model = steps.quantize(asked.traced, stats, config.quantizers)
        done = Quantized(model, steps.specs_for(asked.traced, config.quantizers), record)
    if not config.conversion.reduce_range:
        return done
    assert stats is not None
    model, specs = with_reduced_ranges(asked.traced, stats, done.model, done.specs)
    return Quantized(model, specs, record, done.searched)


def _with_corrections(config: Config, asked: Quantization, folder: Path) -> Quantized:
    assert asked.corrections is not None and asked.images is not None
    corrected, calibration = correct(
        config, asked.traced, asked.corrections, asked.images, asked.ranges.given, folder
    )
    if calibration:
        save_stats(corrected.stats, folder / STATS_FILE)
    record = {"calibration": calibration | asked.ranges.record, "corrections": corrected.record}
    return Quantized(corrected.model, corrected.specs, record, folded=corrected.folded)
