"""What a tuning needs before its first trial, decided before any long work."""

from __future__ import annotations

import hashlib
import logging
import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
import yaml
from torch import fx

import qtool.config as configs
from qtool.config import Config, dump_quantizers
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.observers.stats_yaml import write_stats
from qtool.pipeline import runs, steps
from qtool.pipeline.inputs import (
    Images,
    Subject,
    open_calibration,
    open_evaluation,
    open_subject,
    weights_sha256,
)
from qtool.pipeline.passes import evaluate_images
from qtool.pipeline.ranges import Ranges, find_ranges, find_stats
from qtool.pipeline.searches import images_sha256
from qtool.pipeline.tuning.bench import Parts, split
from qtool.pipeline.tuning.files import pack, unpack
from qtool.pipeline.tuning.space import check_space, tuning_space
from qtool.quantizers.plan import plan_model
from qtool.search.history import History
from qtool.search.strategies.bayesian import load_optuna
from qtool.search.workers import RAY, load_ray

LOG = logging.getLogger("qtool")


@dataclass(frozen=True)
class Opened:
    """What was opened.

    Args:
        config: where the tuning starts.
        subject: the float network.
        traced: the same, traced.
        evaluation: the evaluation images.
        ranges: where those of activations come from.
    """

    config: Config
    subject: Subject
    traced: fx.GraphModule
    evaluation: Images
    ranges: Ranges


def open_tuning(config: Config) -> Opened:
    """Open all that a tuning needs.

    Raises:
        QtoolError: for whatever would stop it later.
    """
    configs.check_tuning(config)
    configs.check_evaluation(config)
    if config.tuning.strategy == "bayesian":
        load_optuna()
    if config.tuning.trial_workers.startswith(RAY):
        load_ray()
    check_space(config)
    runs.check_before_work(config, data_needed=True)
    subject = open_subject(config)
    runs.refuse_quantized(subject, "tune")
    evaluation = open_evaluation(config, subject)
    traced = subject.traced()
    steps.specs_for(traced, config.quantizers)  # an unmatched pattern is found before any long work
    ranges = find_ranges(config, subject, traced, evaluation, searches=True)
    return Opened(config, subject, traced, evaluation, ranges)


def inputs_of(opened: Opened) -> dict[str, Any]:
    """What the numbers of a history depend on; another goal, strategy or limit may go on with them."""
    config = opened.config
    calibration = opened.ranges.calibration or open_calibration(config, opened.subject, opened.evaluation)
    given = opened.ranges.given
    choosing, _ = split(config, opened.evaluation)
    quantizers = replace(config.quantizers, stats_file=None)
    return {
        "network": [opened.subject.arch, weights_sha256(opened.traced)],
        "statistics": None if given is None else hashlib.sha256(write_stats(given).encode()).hexdigest(),
        "calibration images": [len(calibration.indices), images_sha256(calibration)],
        "averages": config.calibration.batchwise_statistics,
        "evaluation images": [len(opened.evaluation.indices), images_sha256(opened.evaluation)],
        "images that choose (--holdout)": [len(choosing.indices), images_sha256(choosing)],
        "preprocessing": repr(opened.subject.preprocessing),
        "batch size": config.data.batch_size,
        "quantizers": yaml.safe_load(dump_quantizers(quantizers))["quantizers"],
        "corrections": asdict(config.corrections),
        "ranking images": config.tuning.ranking_images,
        "trial engine": config.tuning.trial_engine,
        "engine": config.evaluation.engine,
        "arithmetic": config.evaluation.arithmetic,
        "latency": config.tuning.objective == "latency",
        "device": config.run.chosen_device,
        "seed": config.run.seed,
        "versions of torch and SciPy": [torch.__version__, scipy.__version__],
    }


def open_parts(opened: Opened, history: History, folder: Path) -> Parts:
    """Statistics and float outputs, from the history if it has them, else measured and kept there."""
    config, traced = opened.config, opened.traced
    files = history.files()
    if files:
        LOG.info("statistics and float outputs: %s", history.path)
        stats, float_result = unpack(files)
    else:
        stats_, _ = find_stats(config, traced, opened.ranges, folder)
        assert stats_ is not None  # dynamic mode is refused
        stats = stats_
        float_result = evaluate_images(config, opened.subject.network, opened.evaluation, "evaluating float")
        history.put_files(pack(stats, float_result))
        stats, float_result = unpack(history.files())  # as one that goes on has them
    folded = fold_batch_norms(traced)
    specs = steps.specs_for(traced, config.quantizers)
    plan = plan_model(folded.traced, move_stats(stats, folded.pairs), specs)
    space = tuning_space(config, traced, folded.traced, plan)
    return Parts(config, opened.subject, traced, opened.evaluation, stats, float_result, space)


def versions() -> dict[str, str]:
    """Of what measures a trial."""
    try:
        own = metadata.version("qtool")
    except metadata.PackageNotFoundError:
        own = "from source"
    found = {"qtool": own, "python": platform.python_version()}
    return found | {m.__name__: m.__version__ for m in (torch, numpy, scipy)}
