"""The command sensitivity: which layers hurt, from the settings to the files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import yaml
from tqdm import tqdm

import qtool.config as configs
from qtool.config import Config, dump_quantizers
from qtool.config.sections.sensitivity import DAMAGE
from qtool.errors import ConfigError
from qtool.observers.stats import ModelStats
from qtool.pipeline import runs
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.sensitivity.measuring import (
    Batches,
    Measured,
    Measurer,
    Row,
    Share,
    is_estimated,
    measure,
)
from qtool.pipeline.sensitivity.opening import COMMAND, MakeMeasurer, Opened, open_measurement
from qtool.pipeline.sensitivity.reports import as_csv, as_yaml, overridden, overrides_for, tables
from qtool.run_dir import write_text
from qtool.search.workers import RAY, Pool, crew_of, load_ray

LOG = logging.getLogger("qtool")

# Of each worker: they do not all take the same time.
SHARES = 2
YAML_FILE, CSV_FILE, WORST_FILE = "sensitivity.yaml", "sensitivity.csv", "worst.yaml"


def run(config: Config) -> runs.Outcome:
    """Measure every group of layers, and write what was found."""
    _check(config)
    asked = config.sensitivity
    opened = open_measurement(config, COMMAND, asked.measured_images)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", opened.subject.arch, opened.subject.weights)
        stats = opened.stats(config, folder)
        LOG.info("measuring on %s", opened.images.words)
        batches = opened.batches(config)
        start = time.perf_counter()
        rows = _rows(config, opened, stats, batches)
        seconds = time.perf_counter() - start
        if not rows:
            raise ConfigError(
                "sensitivity: no layer that was to be quantized can be; 'qtool layers' says why"
            )
        head = _head(config, opened, sum(len(labels) for _, labels in batches), seconds)
        write_text(folder / YAML_FILE, as_yaml(rows, head, asked.by))
        write_text(folder / CSV_FILE, as_csv(rows))
        parts = [f"{opened.subject.arch}, {opened.images.words}", tables(rows, asked.by)]
        parts += _worst(config, opened, rows, folder / WORST_FILE)
        write_text(folder / runs.RESULTS_FILE, json.dumps({"sensitivity": head}, indent=2) + "\n")
    return runs.Outcome("\n".join([*parts, str(folder)]), folder, {"sensitivity": head})


def _rows(config: Config, opened: Opened, stats: ModelStats, batches: Batches) -> list[Row]:
    """What there is to say of each group, measured by this process, others, or a cluster."""
    asked, seed = config.sensitivity, config.run.seed
    # Not shown before something is measured: an estimate has a bar of its own.
    with tqdm(desc="measuring", unit="run", leave=False, disable=None, delay=0.1) as bar:
        measurer = Measurer(opened.traced, stats, opened.quantizers, batches, asked, bar.update)
        crew = crew_of(asked.point_workers, MakeMeasurer(config, stats))
        if crew is None:
            return measure(measurer, seed, lambda shares: map(measurer, shares))

        def by_crew(shares: Sequence[Share]) -> Iterator[Measured]:
            for found in Pool(crew).run(shares):
                bar.update(len(found.scores))
                yield found

        with closing(crew):
            return measure(measurer, seed, by_crew, SHARES * crew.size)


def _check(config: Config) -> None:
    """Refuse what a measurement of single layers cannot honour."""
    if config.corrections.methods:
        raise ConfigError(
            "--corrections: single layers are measured without corrections, which work on all of them; leave "
            "it out, --preset gives its estimators"
        )
    configs.refuse_given(
        config, ("lapq", "search", "conversion", "evaluation"), "is of 'qtool quantize', not of this command"
    )
    asked = config.sensitivity
    if asked.exact and (asked.direction == "gain" or asked.by in ("loss", "top1")):
        what = "--direction gain" if asked.direction == "gain" else f"--by {asked.by}"
        raise ConfigError(f"--exact: {what} is always measured, never estimated; leave it out")
    if asked.point_workers != "1" and asked.direction == DAMAGE and is_estimated(asked):
        raise ConfigError(
            "--workers: the damage of all groups is estimated at once, in this process; measure each with "
            "--exact, or leave --workers out"
        )
    if asked.point_workers.startswith(RAY):
        load_ray()


def _head(config: Config, opened: Opened, images: int, seconds: float) -> dict[str, Any]:
    asked = config.sensitivity
    return {
        "arch": opened.subject.arch,
        "weights": opened.subject.weights,
        "images": images,
        "dataset": opened.images.dataset.name,
        "overlap": opened.overlap,
        "by": asked.by,
        "per": asked.per,
        "direction": asked.direction,
        "seed": config.run.seed,
        "seconds": round(seconds, 3),
    }


def _worst(config: Config, opened: Opened, rows: list[Row], path: Any) -> list[str]:
    """The overrides for the worst groups, in words and as a file."""
    found = overrides_for(rows, opened.traced, opened.quantizers, config.sensitivity.worst)
    if not found:
        return []
    write_text(path, dump_quantizers(overridden(opened.quantizers, opened.traced, found)))
    block = yaml.safe_dump({"quantizers": {"overrides": found}}, sort_keys=False).rstrip()
    return ["", f"more bits for the worst {config.sensitivity.worst}, as in {path} (-c takes it):", block]
