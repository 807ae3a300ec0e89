"""Where the ranges of activations come from: statistics from a file, calibration images, or each batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from qtool.config import Config
from qtool.errors import ConfigError
from qtool.observers.files import read_stats
from qtool.observers.stats import ModelStats
from qtool.pipeline.inputs import Images, Subject, open_calibration, shared_images
from qtool.pipeline.passes import measure_stats
from qtool.pipeline.provenance import check_origin
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.pipeline.stats_files import STATS_FILE, save_stats

LOG = logging.getLogger("qtool")


@dataclass(frozen=True)
class Ranges:
    """Where the ranges of activations come from: one of the two, or neither in dynamic mode.

    Args:
        given: statistics from a file.
        calibration: images to measure them on.
        record: the same for results.json.
    """

    given: ModelStats | None
    calibration: Images | None
    record: dict[str, Any]


def find_ranges(
    config: Config, subject: Subject, traced: fx.GraphModule, evaluation: Images, searches: bool = False
) -> Ranges:
    """Open the one source of ranges that was asked for; several at once are refused.

    Args:
        config, subject, traced, evaluation: of the run.
        searches: whether calibration images beside statistics have a use: a search evaluates on them.
    """
    asked = config.calibration
    stats_file = config.quantizers.stats_file
    if config.quantizers.dynamic or stats_file is not None:
        source = "--qe-dynamic" if config.quantizers.dynamic else "--qe-stats-file"
        wanted = (asked.fraction, asked.calib_samples, asked.calib_data, asked.calib_split)
        if any(value is not None for value in wanted) and not searches:
            raise ConfigError(
                f"{source}: calibration images were given too; leave out {source}, "
                "or the options of calibration"
            )
        if stats_file is None:
            LOG.info("dynamic mode: the ranges of activations are those of each batch")
            return Ranges(None, None, {"dynamic": True, "per_sample": config.quantizers.per_sample})
        given = read_stats(stats_file)
        check_origin(given, traced, subject.preprocessing, config.quantizers.stats_as_is)
        LOG.info("statistics: %s", given.source)
        return Ranges(given, None, {"stats_file": str(stats_file)})
    images = open_calibration(config, subject, evaluation)
    overlap = shared_images(evaluation, images)
    return Ranges(None, images, {"dataset": images.dataset.name, "overlap": overlap})


def find_stats(
    config: Config, traced: fx.GraphModule, ranges: Ranges, folder: Path, ranks: Ranks = ALONE
) -> tuple[ModelStats | None, dict[str, Any]]:
    """The statistics of a run, and what results.json says of them.

    They are measured and written unless there are some; None in dynamic mode. Those of a run whose
    search is resumed are taken over.
    """
    if ranges.calibration is None:
        return ranges.given, ranges.record
    earlier = None if config.search.resume is None else config.search.resume / STATS_FILE
    if earlier is not None and earlier.is_file():
        LOG.info("statistics: %s", earlier)
        stats = read_stats(earlier)
        record: dict[str, Any] = {"stats_file": str(earlier)}
    else:
        stats, skipped = measure_stats(config, traced, ranges.calibration, ranks)
        record = {"images": len(ranges.calibration.indices) - skipped, "skipped": skipped}
    save_stats(stats, folder / STATS_FILE)
    return stats, record | ranges.record
