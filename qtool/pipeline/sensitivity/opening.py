"""What a measurement of single layers works on: the network, its settings, its images."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

import qtool.config as configs
from qtool.config import Config, QuantizeConfig
from qtool.data.calibration_set import calibration_indices, overlap
from qtool.data.datasets import check_outputs
from qtool.errors import ConfigError, DataError
from qtool.observers.stats import ModelStats
from qtool.pipeline import runs, steps
from qtool.pipeline.corrections.presets import choose, traits_of
from qtool.pipeline.inputs import Images, Subject, open_calibration, open_evaluation, open_subject
from qtool.pipeline.notes import note_idle_settings
from qtool.pipeline.ranges import Ranges, find_ranges, find_stats
from qtool.pipeline.sensitivity.measuring import Measurer
from qtool.pipeline.workers import for_worker

LOG = logging.getLogger("qtool")

COMMAND = "sensitivity"


@dataclass(frozen=True)
class Opened:
    """A run's network and images, before any long work.

    Args:
        subject, traced: the float network.
        evaluation: the evaluation images.
        ranges: where those of activations come from.
        quantizers: the settings of the quantizer, with a preset's estimators.
        images: those to measure on.
        overlap: how many of them are evaluation images.
    """

    subject: Subject
    traced: fx.GraphModule
    evaluation: Images
    ranges: Ranges
    quantizers: QuantizeConfig
    images: Images
    overlap: int

    def stats(self, config: Config, folder: Path) -> ModelStats:
        """The statistics, measured and written unless there are some."""
        found, _ = find_stats(config, self.traced, self.ranges, folder)
        assert found is not None  # dynamic mode is refused
        return found

    def batches(self, config: Config) -> list[tuple[Tensor, Tensor]]:
        """The images and labels to measure on, all in memory.

        Raises:
            DataError: if none can be read.
        """
        found = [(x, torch.as_tensor(y).long()) for x, y, *_ in self.images.loader(config)]
        if not any(len(labels) for _, labels in found):
            raise DataError(steps.NO_IMAGES)
        return found


def open_measurement(config: Config, command: str, count: int) -> Opened:
    """Open what a command that measures single layers needs.

    Args:
        config: of the run.
        command: for messages.
        count: images to measure on, at most.

    Raises:
        ConfigError: if settings are wrong, or do not go with a measurement.
        DataError, ModelError: if images or the network cannot be read.
    """
    refuse_outputs_of_evaluation(config, command)
    runs.check_before_work(config, data_needed=True)
    if config.quantizers.dynamic:
        raise ConfigError(f"{command}: measures static ranges; leave out --qe-dynamic")
    if config.run.chosen_device != "cpu":
        raise ConfigError(f"--device: {command} measures on the CPU; leave it out")
    subject = open_subject(config)
    runs.refuse_quantized(subject, command)
    evaluation = open_evaluation(config, subject)
    traced = subject.traced()
    quantizers = with_estimators(config, traced)
    configs.check(quantizers)
    specs = steps.specs_for(traced, quantizers)  # an unmatched pattern is found before any long work
    if all(spec.weight is None and spec.output is None for spec in specs.values()):
        raise ConfigError(f"{command}: all layers stay in float; quantize some")
    note_idle_settings(traced, quantizers)
    ranges = find_ranges(config, subject, traced, evaluation, searches=True)
    images = _measured(config, subject, evaluation, ranges, count)
    shared = overlap(evaluation.dataset, evaluation.indices, images.dataset, images.indices)
    return Opened(subject, traced, evaluation, ranges, quantizers, images, shared)


def refuse_outputs_of_evaluation(config: Config, command: str) -> None:
    """Refuse options of what an evaluation writes, for a command that makes none."""
    asked = config.run
    given = {
        "--save-predictions": asked.save_predictions is not None,
        "--confusion": asked.confusion,
        "--skip-float": asked.skip_float,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ConfigError(f"{flag}: {command} evaluates nothing for it; leave it out")


def _measured(config: Config, subject: Subject, evaluation: Images, ranges: Ranges, count: int) -> Images:
    images = ranges.calibration or open_calibration(config, subject, evaluation)
    check_outputs(images.dataset, subject.num_outputs())
    if len(images.indices) < count:
        LOG.info("%d images were asked for to measure on, and %d calibrate", count, len(images.indices))
        count = len(images.indices)
    chosen = images.part(calibration_indices(len(images.indices), samples=count, seed=config.run.seed))
    return replace(chosen, words=f"{count} of the calibration images of {images.dataset.name}")


def with_estimators(config: Config, traced: fx.GraphModule) -> QuantizeConfig:
    """The settings of the quantizer with a preset's estimators, which is said in the log."""
    preset = config.corrections.preset
    if preset in (None, "none"):
        return config.quantizers
    traits = traits_of(traced, steps.specs_for(traced, config.quantizers))
    LOG.info("preset %s: its estimators; single layers are measured without corrections", preset)
    return choose(str(preset), config.quantizers, traits).quantizers


@dataclass(frozen=True)
class MakeMeasurer:
    """Makes what measures groups, in another process.

    Args:
        config: of the run.
        stats: of the float network.
    """

    config: Config
    stats: ModelStats

    def __call__(self) -> Measurer:
        config = for_worker(self.config)
        opened = open_measurement(config, COMMAND, config.sensitivity.measured_images)
        batches = opened.batches(config)
        return Measurer(opened.traced, self.stats, opened.quantizers, batches, config.sensitivity)
