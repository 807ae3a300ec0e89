"""A whole run of a command: inputs, steps, and the files that the run leaves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import fx, nn

import qtool.config as configs
from qtool.config import Config
from qtool.deploy.native import NativeModel
from qtool.errors import ConfigError
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats_yaml import write_stats
from qtool.pipeline import steps
from qtool.pipeline.conversion import (
    conversion_record,
    conversion_text,
    convert_network,
    open_target,
    write_native,
)
from qtool.pipeline.coverage import coverage
from qtool.pipeline.describe import layer_quant_params, layer_table
from qtool.pipeline.distiller_histograms import DISTILLER_HISTOGRAMS_FILE, save_histograms
from qtool.pipeline.engine import (
    check_engine,
    engine_record,
    engine_text,
    open_engine,
    verify,
    write_engine,
)
from qtool.pipeline.inputs import (
    ADVICE,
    Images,
    Subject,
    announce_default,
    model_info,
    open_calibration,
    open_evaluation,
    open_subject,
    quantized_network,
)
from qtool.pipeline.logits import outputs_of
from qtool.pipeline.notes import note_idle_settings
from qtool.pipeline.passes import evaluate_images, measure_stats
from qtool.pipeline.quantizing import open_quantization, quantize_network
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.stats_files import STATS_FILE, save_stats
from qtool.quantizers.plan import FLOAT, INTEGER, NOT_ASKED, UNREACHED
from qtool.quantizers.prepare import QuantizedModel
from qtool.report import Comparison, Result, compare, confusion_csv, table
from qtool.run_dir import check_writable, write_text, write_whole

LOG = logging.getLogger("qtool")

EDITED_STATS_FILE = "quant_stats_after_prepare_model.yaml"
LAYER_PARAMS_FILE = "layer_quant_params.yaml"
RESULTS_FILE = "results.json"
CHECKPOINT_FILE = "quantized_checkpoint.pth.tar"


@dataclass(frozen=True)
class Outcome:
    """What a command has to say at its end: lines for stdout, and the folder it wrote."""

    text: str
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)


def calibrate(config: Config, ranks: Ranks = ALONE) -> Outcome:
    """Measure activation statistics and write their YAML."""
    return _calibrate(config, ranks, histograms=False)


def collect_histograms(config: Config, ranks: Ranks = ALONE) -> Outcome:
    """Calibrate, and write the histograms in Distiller's form too."""
    return _calibrate(config, ranks, histograms=True)


def _calibrate(config: Config, ranks: Ranks, histograms: bool) -> Outcome:
    check_before_work(config, data_needed=True)
    subject = open_subject(config)
    refuse_quantized(subject, "calibrate")
    images = open_calibration(config, subject, None)
    if images.from_evaluation:
        LOG.warning("these are evaluation images: %s", ADVICE)
    traced = subject.traced()
    with run_folder(config, ranks) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        stats, skipped = measure_stats(config, traced, images, ranks)
        paths = [save_stats(stats, folder / STATS_FILE)]
        if histograms:
            paths.append(save_histograms(stats, folder / DISTILLER_HISTOGRAMS_FILE))
    words = images.words + (f", {skipped} of them unreadable" if skipped else "")
    lines = [f"{len(stats.layers)} layers of {subject.arch} on {words}", *(str(path) for path in paths)]
    return Outcome("\n".join(lines), folder)


def quantize(config: Config, ranks: Ranks = ALONE) -> Outcome:
    """Calibrate unless there are statistics, quantize, and evaluate beside the float network."""
    configs.check_search(config, searches=False)
    if config.lapq.enabled and ranks.size > 1:
        raise ConfigError("--qe-lapq: the search runs in one process; start it without torchrun")
    if config.conversion.convert_pytorch and ranks.size > 1:
        raise ConfigError("--qe-convert-pytorch: converts in one process; start it without torchrun")
    configs.check_conversion(config)
    configs.check_evaluation(config)
    target = open_target(config)
    check_before_work(config, data_needed=True)
    subject = open_subject(config)
    refuse_quantized(subject, "quantize")
    evaluation = open_evaluation(config, subject)
    traced = subject.traced()
    steps.specs_for(traced, config.quantizers)  # an unmatched pattern is found before any long work
    note_idle_settings(traced, config.quantizers)
    plans = open_quantization(config, subject, traced, evaluation, ranks)
    with run_folder(config, ranks) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        done = quantize_network(config, plans, folder, ranks)
        model = done.model
        log_notes(model)
        native = None if target is None else convert_network(model, target)
        engine = open_engine(config, model, evaluation)
        write_model(config, folder, subject, traced, model, done.specs)
        if native is not None:
            write_native(config, folder, subject, native, subject.num_outputs())
        write_engine(folder, engine)
        results, comparison = evaluate_both(config, subject, engine.network, evaluation, ranks, native)
        record = run_record(config, subject, evaluation, results, comparison)
        record["engine"] = engine_record(config, engine)
        record |= done.record
        shown = results
        if done.searched is not None:
            start = open_engine(config, done.searched.initial, evaluation).network
            initial = evaluate_images(config, start, evaluation, "evaluating LAPQ's start", ranks)
            record["lapq"] = done.searched.record_with(initial)
            shown = {**results, "LAPQ start": initial}
        if native is not None:
            against = compare(results["quantized"], results["native"])
            record["conversion"] = conversion_record(native, against)
        verified, parity = verify(config, folder, model, native or engine.native, evaluation)
        finish(config, folder, record | parity, evaluation, results, ranks)
    converted = "" if native is None else conversion_text(native, against)
    lines = [f"{subject.arch}, {evaluation.words}", table(shown, comparison), engine_text(engine)]
    text = "\n".join(filter(None, [*lines, converted, verified, str(folder)]))
    return Outcome(text, folder, record | parity)


def write_model(
    config: Config,
    folder: Path,
    subject: Subject,
    traced: fx.GraphModule,
    model: QuantizedModel,
    specs: Mapping[str, LayerSpec],
) -> None:
    """Write what a quantized network was made from, and the network."""
    if model.plan.edited_stats is not None:
        write_text(folder / EDITED_STATS_FILE, write_stats(model.plan.edited_stats))
    params = layer_quant_params(model.plan, specs)
    write_text(folder / LAYER_PARAMS_FILE, yaml.safe_dump(params, sort_keys=False))
    prefix = f"{config.run.name}_" if config.run.name else ""
    steps.save(model, folder / f"{prefix}{CHECKPOINT_FILE}", **model_info(subject, outputs_of(traced.graph)))


def evaluate(config: Config, ranks: Ranks = ALONE) -> Outcome:
    """Evaluate the float network, or a saved quantized one, or one on int8 kernels."""
    if config.conversion.convert_pytorch and ranks.size > 1:
        raise ConfigError("--qe-convert-pytorch: converts in one process; start it without torchrun")
    configs.check_conversion(config)
    configs.check_evaluation(config)
    target = open_target(config)
    check_before_work(config, data_needed=True)
    subject = open_subject(config)
    _check_convertible(config, subject)
    check_engine(config, subject)
    evaluation = open_evaluation(config, subject)
    model = quantized_network(subject)
    with run_folder(config, ranks) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        native = None if target is None or model is None else convert_network(model, target)
        engine = None if model is None else open_engine(config, model, evaluation)
        if native is not None:
            write_native(config, folder, subject, native, subject.num_outputs())
        if engine is not None:
            write_engine(folder, engine)
        name, network = subject.form, subject.network if engine is None else engine.network
        results = {name: evaluate_images(config, network, evaluation, f"evaluating {name}", ranks)}
        if native is not None:
            results["native"] = evaluate_images(config, native, evaluation, "evaluating native", ranks)
        record = run_record(config, subject, evaluation, results, None)
        lines = [f"{subject.arch}, {evaluation.words}", table(results)]
        if engine is not None:
            record["engine"] = engine_record(config, engine)
            lines.append(engine_text(engine))
        if native is not None:
            against = compare(results["quantized"], results["native"])
            record["conversion"] = conversion_record(native, against)
            lines.append(conversion_text(native, against))
        if model is not None and engine is not None:
            verified, parity = verify(config, folder, model, native or engine.native, evaluation)
            record |= parity
            lines.append(verified)
        finish(config, folder, record, evaluation, results, ranks)
    return Outcome("\n".join(filter(None, [*lines, str(folder)])), folder, record)


def _check_convertible(config: Config, subject: Subject) -> None:
    kernels = {
        "native": "torch's int8 kernels, which are",
        "onnx": "onnxruntime, which is here",
        "pt2e": "a program that was exported",
    }
    if subject.form in kernels and config.run.chosen_device != "cpu":
        raise ConfigError(
            f"--device: {subject.weights} runs on {kernels[subject.form]} for the CPU; leave it out"
        )
    if not config.conversion.convert_pytorch:
        return
    if config.conversion.reduce_range:
        raise ConfigError("--qe-reduce-range: the network is quantized already; 'qtool quantize' takes it")
    if subject.form != "quantized":
        raise ConfigError(
            f"--qe-convert-pytorch: {subject.weights} is {subject.form}; 'qtool evaluate' converts a "
            "quantized model that a run has saved, 'qtool quantize' quantizes first"
        )


def list_layers(config: Config) -> str:
    """The layers of a network and what would be done with them."""
    check_before_work(config, data_needed=False)
    subject = open_subject(config)
    refuse_quantized(subject, "layers")
    traced = subject.traced()
    specs = steps.specs_for(traced, config.quantizers)
    return f"{layer_table(traced, specs)}\n{coverage(traced, specs).text}"


def check_before_work(config: Config, data_needed: bool) -> None:
    """Find out before any long work that a setting, the device or an output cannot be had.

    Raises:
        ConfigError, OutputError: naming the flag or the file.
    """
    configs.check(config.quantizers)
    announce_default(config, data_needed)
    try:
        device = torch.device(config.run.chosen_device)
        torch.zeros(1, device=device).item()  # the device "meta" has shapes, but no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device: {config.run.chosen_device} cannot be used here: {reason}") from error
    torch.use_deterministic_algorithms(config.run.det)
    _check_outputs(config)


def _check_outputs(config: Config) -> None:
    """Find out now, rather than after the work, that a result cannot be written."""
    name, path = config.run.name, config.run.save_predictions
    if name and not {"/", "\0"}.isdisjoint(name):
        raise ConfigError(f"--name: {name!r} cannot be part of a folder's name; leave out the '/'")
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--save-predictions: {path} is a folder; name a file in it")
    check_writable(path)


def refuse_quantized(subject: Subject, command: str) -> None:
    """Raise a ConfigError if the network is quantized already."""
    if subject.form != "float":
        raise ConfigError(
            f"--checkpoint: {subject.weights} is quantized already; 'qtool evaluate' evaluates it, "
            f"'qtool {command}' needs a float network"
        )


def evaluate_both(
    config: Config,
    subject: Subject,
    model: nn.Module,
    evaluation: Images,
    ranks: Ranks,
    native: NativeModel | None = None,
) -> tuple[dict[str, Result], Comparison | None]:
    """The float network, unless it is to be skipped, and what it became, on the evaluation images."""
    results = {}
    if not config.run.skip_float:
        results["float"] = evaluate_images(config, subject.network, evaluation, "evaluating float", ranks)
    results["quantized"] = evaluate_images(config, model, evaluation, "evaluating quantized", ranks)
    if native is not None:
        results["native"] = evaluate_images(config, native, evaluation, "evaluating native", ranks)
    comparison = compare(results["float"], results["quantized"]) if "float" in results else None
    return results, comparison


def log_notes(model: QuantizedModel) -> None:
    """Say once, not layer by layer, what did not go as asked."""
    noted = {name: layer for name, layer in model.plan.layers.items() if layer.note}
    left: dict[str, list[str]] = {}
    for name, layer in noted.items():
        if layer.kind == FLOAT and layer.note != NOT_ASKED:
            left.setdefault(layer.note, []).append(name)
    for note, names in left.items():
        say = LOG.warning if note == UNREACHED else LOG.info
        say("%d layers stay in float, such as %s: %s", len(names), names[0], note)
    narrow = [name for name, layer in noted.items() if layer.kind == INTEGER]
    if narrow:
        LOG.warning(
            "%d layers may overflow their accumulators, such as %s: %s; see --qe-bits-accum",
            len(narrow),
            narrow[0],
            noted[narrow[0]].note,
        )


def run_record(
    config: Config,
    subject: Subject,
    evaluation: Images,
    results: dict[str, Result],
    comparison: Comparison | None,
) -> dict[str, Any]:
    """The content of results.json."""
    record: dict[str, Any] = {
        "model": {
            "arch": subject.arch,
            "weights": subject.weights,
            "checkpoint_sha256": subject.checkpoint_sha256,
        },
        "evaluation": {
            "dataset": evaluation.dataset.name,
            "split": evaluation.dataset.split,
            "images": next(iter(results.values())).images,
            "skipped": len(evaluation.indices) - next(iter(results.values())).images,
        },
        "seed": config.run.seed,
    }
    record |= {name: result.as_dict() for name, result in results.items()}
    if comparison is not None:
        record |= comparison.as_dict()
    return record


def finish(
    config: Config,
    folder: Path,
    record: dict[str, Any],
    evaluation: Images,
    results: dict[str, Result],
    ranks: Ranks = ALONE,
) -> None:
    """Write what a run has found, the results last."""
    if config.run.save_predictions is not None and ranks.first:
        path = _npz_path(config.run.save_predictions)
        write_whole(path, lambda file: np.savez_compressed(file, **_predictions(evaluation, results)))
        LOG.info("predictions: %s", path)
    if config.run.confusion:
        classes = int(next(iter(results.values())).logits.shape[1])
        for name, result in results.items():
            path = folder / f"confusion_{name}.csv"
            write_text(path, confusion_csv(result.labels, result.predictions, classes))
            LOG.info("confusion matrix: %s", path)
    # Last, so that it says that the run has ended well.
    write_text(folder / RESULTS_FILE, json.dumps(finite(record), indent=2) + "\n")


def finite(value: Any) -> Any:
    """JSON has no infinity: such a number, as the SQNR of equal logits, becomes null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _npz_path(path: Path) -> Path:
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def _predictions(evaluation: Images, results: dict[str, Result]) -> dict[str, Any]:
    """Per image: path, label, and the prediction of each network."""
    first = next(iter(results.values()))
    assert first.indices is not None
    arrays: dict[str, Any] = {
        "path": np.array([evaluation.dataset.path_of(int(i)) for i in first.indices]),
        "label": first.labels.numpy(),
    }
    return arrays | {f"{name}_prediction": r.predictions.numpy() for name, r in results.items()}
