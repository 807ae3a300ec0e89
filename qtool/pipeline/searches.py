"""The searches of a run: their images, their journal, their progress, and what they leave."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import scipy
import torch
import yaml
from torch import Tensor, fx

from qtool.algorithms.lapq import (
    LapqResult,
    LapqSpec,
    lapq,
    sample_outputs,
    searched_tensors,
)
from qtool.config import Config, dump_quantizers, with_settings_of_layers
from qtool.config.searches import without_weight_clipping
from qtool.config.sections import QuantizeConfig
from qtool.data.calibration_set import calibration_indices, overlap
from qtool.data.datasets import check_outputs
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.observers.stats_yaml import write_stats
from qtool.pipeline import steps
from qtool.pipeline.inputs import Images, Subject, open_calibration, shared_images, weights_sha256
from qtool.pipeline.lapq_progress import LapqProgress
from qtool.quantizers.prepare import QuantizedModel
from qtool.report import Result
from qtool.search.journal import Journal, open_journal
from qtool.search.trials import Trials

LOG = logging.getLogger("qtool")

JOURNAL_FILE = "search_journal.jsonl"


@dataclass(frozen=True)
class SearchedOn:
    """The images that every trial of a search is evaluated on.

    Args:
        images: which.
        overlap: how many of them are evaluation images.
    """

    images: Images
    overlap: int

    def record(self, count: int) -> dict[str, Any]:
        """What results.json says of them; count is how many could be read."""
        dataset = self.images.dataset
        return {
            "images": count,
            "dataset": dataset.name,
            "split": dataset.split,
            "overlap": self.overlap,
        }


def open_search(
    config: Config, subject: Subject, evaluation: Images, calibration: Images | None
) -> SearchedOn:
    """A share of the calibration images.

    Args:
        config, subject, evaluation: of the run.
        calibration: its calibration images; None where statistics were given, for those it would have had.
    """
    images = calibration or open_calibration(config, subject, evaluation)
    check_outputs(images.dataset, subject.num_outputs())
    count, share = len(images.indices), config.search.eval_size
    chosen = [images.indices[i] for i in calibration_indices(count, fraction=share, seed=config.run.seed)]
    words = f"{len(chosen)} of the calibration images of {images.dataset.name}"
    images = replace(images, indices=chosen, words=words)
    if calibration is None:
        return SearchedOn(images, shared_images(evaluation, images))
    return SearchedOn(images, overlap(evaluation.dataset, evaluation.indices, images.dataset, chosen))


def load_batches(config: Config, searched: SearchedOn) -> list[tuple[Tensor, Tensor]]:
    """The images and labels, all in memory."""
    LOG.info("the search evaluates on %s", searched.images.words)
    return [(images, torch.as_tensor(labels).long()) for images, labels, *_ in searched.images.loader(config)]


@dataclass(frozen=True)
class Searched:
    """What LAPQ found.

    Args:
        model: the network quantized with the best ranges.
        initial: the one quantized with those of the initialisation.
        specs: of model.
        record: what results.json says.
    """

    model: QuantizedModel
    initial: QuantizedModel
    specs: dict[str, LayerSpec]
    record: dict[str, Any]

    def record_with(self, initial: Result) -> dict[str, Any]:
        """The record with the result of the initialisation on the evaluation images."""
        evaluated = {key: value for key, value in initial.as_dict().items() if key != "images_per_second"}
        return {**self.record, "initial": {**self.record["initial"], "evaluation": evaluated}}


def quantize_with_lapq(
    config: Config,
    folder: Path,
    subject: Subject,
    traced: fx.GraphModule,
    stats: ModelStats,
    searched: SearchedOn,
) -> Searched:
    """Search for ranges, and quantize with the best."""
    start = time.perf_counter()
    quantizers = _without_clipping(config.quantizers, traced)
    specs = steps.specs_for(traced, quantizers)
    trials = Trials(traced, stats, load_batches(config, searched), config.run.chosen_device)
    settings = _lapq_spec(config)
    outputs = sample_outputs(trials.float_network(), [images for images, _ in trials.batches])
    tensors = searched_tensors(trials.folded.traced, trials.stats, specs, outputs, settings)
    LOG.info("LAPQ: %d ranges", len(tensors))
    progress = LapqProgress(config, folder, quantizers, settings, tensors, trials)
    inputs = {"lapq": asdict(settings), **search_inputs(config, subject, traced, stats, searched)}
    with journal_of(config, folder, inputs) as journal, progress:
        result = lapq(
            tensors, specs, lambda trial: trials.score(trial).loss, settings, journal, progress.watch
        )
    progress.write(result.specs)
    LOG.info("LAPQ: loss %.6g after initialisation, %.6g at the end", result.initial_loss, result.loss)
    record = _lapq_record(config, trials, result, journal, searched)
    record["seconds"] = round(time.perf_counter() - start, 3)
    model, initial = trials.quantize(result.specs), trials.quantize(result.initial)
    return Searched(model, initial, dict(result.specs), record)


def _lapq_spec(config: Config) -> LapqSpec:
    asked = config.lapq
    return LapqSpec(
        init_mode=asked.init_mode,
        init_method=asked.init_method,
        method=asked.method,
        maxiter=asked.maxiter,
        maxfev=asked.maxfev,
        basinhopping=asked.basinhopping,
        basinhopping_niter=asked.basinhopping_niter,
        both_ends=asked.search_clipping,
        seed=config.run.seed,
    )


def _lapq_record(
    config: Config, trials: Trials, result: LapqResult, journal: Journal, searched: SearchedOn
) -> dict[str, Any]:
    initial = trials.score(result.initial)
    final = trials.score(result.specs)
    return {
        "initial": {"mode": config.lapq.init_mode, "loss": result.initial_loss, "top1": initial.top1},
        "final": {"loss": result.loss, "top1": final.top1},
        "p": result.p,
        "losses_of_p": {f"{p:.6g}": loss for p, loss in result.losses_of_p.items()},
        "ranges": result.tensors,
        "evaluations": result.evaluations,
        "resumed": journal.taken,
        "images": searched.record(trials.images),
    }


def _without_clipping(config: QuantizeConfig, traced: fx.GraphModule) -> QuantizeConfig:
    """The settings with clip mode none everywhere; clip modes that were asked for are set aside."""
    specs = steps.specs_for(traced, config)
    clipped = [n for n, s in specs.items() if s.clip.mode != "none" or s.weight_clip is not None]
    if clipped:
        LOG.warning(
            "clip modes are set aside, such as that of %s: --qe-lapq chooses all ranges, and starts where "
            "--lapq-init-mode says",
            clipped[0],
        )
    return with_settings_of_layers(without_weight_clipping(config), list(specs), {})


@contextmanager
def journal_of(config: Config, folder: Path, inputs: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a run's search, with the entries of the run that it resumes."""
    resumed = config.search.resume
    earlier = None if resumed is None else resumed / JOURNAL_FILE
    with open_journal(folder / JOURNAL_FILE, inputs, earlier) as journal:
        LOG.info("a run that is ended can go on: add --resume-search-from %s", folder)
        yield journal
        if earlier is not None:
            LOG.info("%d results were taken from %s", journal.taken, earlier)


def search_inputs(
    config: Config, subject: Subject, traced: fx.GraphModule, stats: ModelStats, searched: SearchedOn
) -> dict[str, Any]:
    """What the numbers of a search depend on, apart from its own settings."""
    quantizers = replace(config.quantizers, stats_file=None)
    return {
        "network": [subject.arch, weights_sha256(traced)],
        "statistics": hashlib.sha256(write_stats(stats).encode()).hexdigest(),
        "images": [len(searched.images.indices), images_sha256(searched.images)],
        "preprocessing": repr(subject.preprocessing),
        "batch size": config.data.batch_size,
        "quantizers": yaml.safe_load(dump_quantizers(quantizers))["quantizers"],
        "device": config.run.chosen_device,
        "versions": [torch.__version__, scipy.__version__],
    }


def images_sha256(images: Images) -> str:
    """Of the paths and labels of some images, in order."""
    digest = hashlib.sha256()
    for index in images.indices:
        line = f"{images.dataset.path_of(index)}\0{images.dataset.labels[index]}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
