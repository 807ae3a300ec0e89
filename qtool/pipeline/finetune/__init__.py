"""The command finetune: quantize, train the quantized network, and evaluate it beside the float one."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

import qtool.config as configs
from qtool.algorithms.lsq import FinetuneSettings, Trainer, why_not
from qtool.config import Config
from qtool.errors import ConfigError
from qtool.graph.fold import Folded, fold_batch_norms
from qtool.pipeline import runs, steps
from qtool.pipeline.corrections.run import LAYERS_FOLDER
from qtool.pipeline.engine import engine_record, engine_text, open_engine, verify, write_engine
from qtool.pipeline.finetune.images import TrainingImages, open_training, with_training_calibration
from qtool.pipeline.finetune.loop import train
from qtool.pipeline.finetune.state import RATES, TrainingState, inputs_of
from qtool.pipeline.inputs import Images, open_evaluation, open_subject
from qtool.pipeline.logits import logits_of
from qtool.pipeline.notes import note_idle_settings
from qtool.pipeline.passes import evaluate_images
from qtool.pipeline.quantizing import Quantized, open_quantization, quantize_network
from qtool.pipeline.ranks import ALONE
from qtool.pipeline.run_folder import CONFIG_FILE, run_folder
from qtool.quantizers.prepare import QuantizedModel, build
from qtool.report import table
from qtool.run_dir import write_text

LOG = logging.getLogger("qtool")

LOSSES_FILE = "training_losses.csv"


def run(config: Config) -> runs.Outcome:
    """Quantize a network, train the result on the training images, and evaluate start and end."""
    _check(config)
    runs.check_before_work(config, data_needed=True)
    subject = open_subject(config)
    runs.refuse_quantized(subject, "finetune")
    evaluation = open_evaluation(config, subject)
    images = open_training(config, subject, evaluation)
    traced = subject.traced()
    steps.specs_for(traced, config.quantizers)  # an unmatched pattern is found before any long work
    note_idle_settings(traced, config.quantizers)
    quantizing = _for_the_start(config)
    asked = open_quantization(quantizing, subject, traced, evaluation)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        done = quantize_network(quantizing, asked, folder)
        found = _trained(config, folder, traced, done, images)
        model = found.model
        runs.log_notes(model)
        engine = open_engine(config, model, evaluation)
        runs.write_model(config, folder, subject, traced, model, done.specs)
        write_engine(folder, engine)
        results, comparison = runs.evaluate_both(config, subject, engine.network, evaluation, ALONE)
        start = evaluate_images(config, done.model, evaluation, "evaluating the start")
        record = runs.run_record(config, subject, evaluation, results, comparison)
        record["engine"] = engine_record(config, engine)
        start_record = {k: v for k, v in start.as_dict().items() if k != "images_per_second"}
        record |= done.record | {"finetuning": found.record | {"start": start_record}}
        verified, parity = verify(config, folder, model, engine.native, evaluation)
        runs.finish(config, folder, record | parity, evaluation, results, ALONE)
    shown = {name: result for name, result in results.items() if name == "float"}
    shown |= {"start": start, "quantized": results["quantized"]}
    lines = [f"{subject.arch}, {evaluation.words}", table(shown, comparison), found.words]
    lines += [engine_text(engine), verified, str(folder)]
    return runs.Outcome("\n".join(filter(None, lines)), folder, record | parity)


def _check(config: Config) -> None:
    """Refuse what training cannot honour, before anything is opened.

    Raises:
        ConfigError: naming the flag.
    """
    others = ("lapq", "search", "conversion")
    configs.refuse_given(config, others, "is of 'qtool quantize', which does not train; use that")
    configs.check_evaluation(config)
    if config.quantizers.dynamic:
        raise ConfigError(
            "--qe-dynamic: finds grids batch by batch, so that there are none to train; leave it out"
        )
    if config.finetuning.distillation == 0 and config.finetuning.temperature != 1:
        raise ConfigError("--temperature: has an effect with --distillation above 0 only; leave it out")


def _for_the_start(config: Config) -> Config:
    """The settings that the network is quantized with, before it is trained.

    What a resumed run has measured and corrected is taken over.
    """
    config = with_training_calibration(config)
    earlier = config.finetuning.resume_training
    if earlier is None:
        return config
    corrects = config.corrections.asked
    if corrects and not (earlier / LAYERS_FOLDER).is_dir():
        return config  # corrections that are quick, and are made again
    return replace(config, search=replace(config.search, resume=earlier))


@dataclass(frozen=True)
class Trained:
    """What training has come to.

    Args:
        model: the trained network, or the start where training made nothing better.
        record: what results.json says.
        words: the same in a line or two.
    """

    model: QuantizedModel
    record: dict[str, Any]
    words: str


def _trained(
    config: Config, folder: Path, traced: fx.GraphModule, done: Quantized, images: TrainingImages
) -> Trained:
    trainer = _trainer(config, traced, done)
    rates = {name: getattr(trainer.settings, name) for name in RATES}
    state = TrainingState(folder, inputs_of(config, trainer, images), rates)
    earlier = config.finetuning.resume_training
    losses = [] if earlier is None else state.resume(earlier, trainer)
    taken = trainer.step
    LOG.info("training on %s; batch norms are folded into weights and biases", images.words)
    before = _held_out_loss(config, trainer, done.model, images.held_out)
    began = time.perf_counter()
    with _saying_how_to_resume(folder, state):
        train(config, trainer, images, state, losses)
    seconds = time.perf_counter() - began
    rows = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(losses, start=1))
    write_text(folder / LOSSES_FILE, f"step,loss\n{rows}")
    model = build(*trainer.network.quantized())
    after = _held_out_loss(config, trainer, model, images.held_out)
    kept = before is None or after is None or after < before
    if not kept:
        LOG.warning(
            "the loss on held-out images has not become smaller (%.4g, %.4g): the start is kept",
            before,
            after,
        )
    record = {
        "images": len(images.learn.indices),
        "dataset": images.learn.dataset.name,
        "held_out": 0 if images.held_out is None else len(images.held_out.indices),
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "kept": kept,
        "steps": trainer.step,
        "resumed": taken,
        "seconds": round(seconds, 3),
    }
    words = f"trained {trainer.step} steps on {images.words}, {seconds:.0f} s"
    if before is not None:
        words += (
            f"; loss on those held out {before:.4g} -> {after:.4g}{'' if kept else ', the start is kept'}"
        )
    return Trained(model if kept else done.model, record, words)


def _trainer(config: Config, traced: fx.GraphModule, done: Quantized) -> Trainer:
    asked = config.finetuning
    reference = fold_batch_norms(traced)
    folded: Folded = done.folded or reference
    reason = why_not(folded.traced, done.model.plan)
    if done.model.plan.per_sample:
        reason = "per-sample ranges are those of dynamic mode"
    if reason:
        raise ConfigError(f"finetune: {reason}; leave that in float, or quantize without training")
    settings = FinetuneSettings(
        steps=asked.steps,
        learning_rate=asked.learning_rate,
        scale_learning_rate=asked.scale_learning_rate,
        distillation=asked.distillation,
        temperature=asked.temperature,
        ranges=asked.step_sizes,
    )
    return Trainer(reference.traced, folded, done.model.plan, settings, config.run.chosen_device)


@torch.no_grad()
def _held_out_loss(
    config: Config, trainer: Trainer, model: QuantizedModel, images: Images | None
) -> float | None:
    """The loss of a quantized network on the images that are not trained on; None if there are none."""
    if images is None:
        return None
    network = steps.evaluable(model, config.run.chosen_device)
    total, count = 0.0, 0
    for batch in images.loader(config):
        logits = logits_of(network(batch.images.to(trainer.network.device)))
        total += len(batch.images) * float(trainer.loss_of(logits, batch.images, batch.labels))
        count += len(batch.images)
    return total / count


@contextmanager
def _saying_how_to_resume(folder: Path, state: TrainingState) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if state.path.is_file():
            LOG.info("to go on: qtool finetune -c %s --resume-training-from %s", folder / CONFIG_FILE, folder)
        raise
