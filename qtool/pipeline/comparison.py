"""The command compare: a float network beside its quantized version, layer by layer and image by image."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import fx
from tqdm import tqdm

import qtool.config as configs
from qtool.config import Config
from qtool.errors import ConfigError, DataError, ModelError
from qtool.graph.control import has_decisions
from qtool.graph.fold import fold_batch_norms
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline import runs, steps
from qtool.pipeline.corrections.methods import NETWORK
from qtool.pipeline.inputs import (
    Images,
    Subject,
    load_subject,
    open_evaluation,
    open_subject,
    quantized_network,
)
from qtool.pipeline.notes import note_idle_settings
from qtool.pipeline.passes import note_bad_images
from qtool.pipeline.quantizing import Quantization, open_quantization, quantize_network
from qtool.pipeline.run_folder import run_folder
from qtool.quantizers.prepare import QuantizedModel
from qtool.run_dir import write_text
from qtool.search.comparison import Comparison, Flip, LayerComparison, flips

LOG = logging.getLogger("qtool")

COMMAND = "compare"
YAML_FILE, LAYERS_FILE, FLIPS_FILE = "compare.yaml", "compare_layers.csv", "compare_flips.csv"
# Images that go through both networks together.
CHUNK = 8
# Flipped images that the terminal shows.
SHOWN = 10
# Rounding, learned too, leaves most weights within a step of their integer.
UNLIKE_STEPS = 1.0


@dataclass(frozen=True)
class Found:
    """What a comparison found.

    Args:
        layers: in the order of execution.
        flips: the images whose prediction is another, and their paths.
        images: how many were compared.
        logit_sqnr_db: of the logits.
    """

    layers: list[LayerComparison]
    flips: list[tuple[str, Flip]]
    images: int
    logit_sqnr_db: float


def compare_networks(config: Config) -> runs.Outcome:
    """Compare a float network with its quantized version on the evaluation images."""
    _check(config)
    runs.check_before_work(config, data_needed=True)
    config = _with_arch_of_file(config)
    subject = open_subject(config)
    runs.refuse_quantized(subject, COMMAND)
    traced = subject.traced()
    if has_decisions(traced.graph):
        raise ModelError(
            f"{subject.arch}: takes branches by values; compare runs both networks along one path"
        )
    evaluation = open_evaluation(config, subject)
    stored = None if config.compare.quantized is None else _stored(config, subject)
    asked = None if stored is not None else _asked(config, subject, traced, evaluation)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        if asked is not None:
            stored = quantize_network(config, asked, folder).model
        assert stored is not None
        runs.log_notes(stored)
        found = _compared(config, subject, traced, stored, evaluation)
        head = _head(subject, evaluation, found)
        write_text(folder / YAML_FILE, _as_yaml(head, found))
        write_text(folder / LAYERS_FILE, _layers_csv(found.layers))
        write_text(folder / FLIPS_FILE, _flips_csv(found.flips))
        write_text(folder / runs.RESULTS_FILE, json.dumps({"compare": runs.finite(head)}, indent=2) + "\n")
    parts = [f"{subject.arch}, {evaluation.words}", _layers_text(found.layers), "", _flips_text(found)]
    return runs.Outcome("\n".join([*parts, str(folder)]), folder, {"compare": head})


def _check(config: Config) -> None:
    configs.refuse_given(config, ("lapq",), "is of 'qtool quantize'; compare the checkpoint that it leaves")
    configs.refuse_given(
        config, ("search", "conversion", "evaluation"), "is of 'qtool quantize', not of this command"
    )
    run = config.run
    if config.run.chosen_device != "cpu":
        raise ConfigError(f"--device: {COMMAND} runs on the CPU; leave it out")
    for flag, given in {
        "--save-predictions": run.save_predictions is not None,
        "--confusion": run.confusion,
        "--skip-float": run.skip_float,
    }.items():
        if given:
            raise ConfigError(f"{flag}: {COMMAND} writes the images that flip only; leave it out")
    if config.quantizers.dynamic:
        raise ConfigError(f"{COMMAND}: compares on grids that are fixed; leave out --qe-dynamic")
    if config.compare.quantized is not None:
        reason = "the network of --quantized is quantized already; leave that out"
        configs.refuse_given(config, ("quantizers", "corrections", "calibration"), reason)


def _with_arch_of_file(config: Config) -> Config:
    """The network that a quantized checkpoint names, where the model options name none."""
    path = config.compare.quantized
    if path is None or config.model.arch is not None:
        return config
    stored = load_subject(_for_file(config, path))
    return replace(config, model=replace(config.model, arch=stored.arch))


def _for_file(config: Config, path: Path) -> Config:
    return replace(config, model=replace(config.model, checkpoint=path, pretrained=False, weights=None))


def _stored(config: Config, subject: Subject) -> QuantizedModel:
    """The network of --quantized.

    Raises:
        ConfigError: if it is none, or of another network.
    """
    path = config.compare.quantized
    assert path is not None
    other = load_subject(_for_file(config, path))
    model = quantized_network(other)
    if model is None:
        raise ConfigError(
            f"--quantized: {path} is {other.form}; give the quantized_checkpoint.pth.tar of a run"
        )
    if model.plan.dynamic:
        raise ConfigError(f"--quantized: {path} is in dynamic mode, which has no grids to compare on")
    return model


def _asked(config: Config, subject: Subject, traced: fx.GraphModule, evaluation: Images) -> Quantization:
    """How the network is to be quantized, decided before any long work."""
    steps.specs_for(traced, config.quantizers)
    note_idle_settings(traced, config.quantizers)
    asked = open_quantization(config, subject, traced, evaluation)
    moved = [] if asked.corrections is None else asked.corrections.on_network
    if moved:
        assert moved[0].method.stage == NETWORK
        raise ConfigError(
            f"--corrections: {moved[0].name} moves factors between layers, whose outputs then cannot be "
            "compared; leave it out"
        )
    return asked


def _compared(
    config: Config, subject: Subject, traced: fx.GraphModule, model: QuantizedModel, evaluation: Images
) -> Found:
    try:
        comparison = Comparison(fold_batch_norms(traced), model)
    except ValueError as error:
        raise ConfigError(f"--quantized: {error}") from error
    loader = evaluation.loader(config, CHUNK)
    flipped: list[tuple[str, Flip]] = []
    logits: list[tuple[torch.Tensor, torch.Tensor]] = []
    count = 0
    for batch in tqdm(loader, desc="comparing", unit="batch", leave=False, disable=None):
        labels = torch.as_tensor(batch.labels).long()
        pair = comparison.add(batch.images)
        logits.append(pair)
        for flip in flips(*pair, labels):
            flipped.append((evaluation.dataset.path_of(int(batch.indices[flip.image])), flip))
        count += len(labels)
    note_bad_images(loader.bad_images)
    if not count:
        raise DataError(steps.NO_IMAGES)
    expected, found = (torch.cat(parts) for parts in zip(*logits, strict=True))
    layers = comparison.layers()
    unlike = [one.layer for one in layers if one.weight_steps is not None and one.weight_steps > UNLIKE_STEPS]
    if unlike:
        LOG.warning(
            "the weights of %d layers, such as %s, are not those of this float network, rounded: they are of "
            "another checkpoint, or were equalized; outputs of such layers are compared all the same",
            len(unlike),
            unlike[0],
        )
    return Found(layers, flipped, count, sqnr_db(expected, found))


def _head(subject: Subject, evaluation: Images, found: Found) -> dict[str, Any]:
    return {
        "arch": subject.arch,
        "weights": subject.weights,
        "dataset": evaluation.dataset.name,
        "images": found.images,
        "logit_sqnr_db": found.logit_sqnr_db,
        "flipped": len(found.flips),
        "agreement": 100 * (1 - len(found.flips) / found.images),
    }


def _row(one: LayerComparison) -> dict[str, Any]:
    """One layer's numbers, flat; None where there is none."""
    row = {key: value for key, value in asdict(one).items() if key != "codes"}
    codes = {} if one.codes is None else asdict(one.codes)
    for key in ("saturated", "levels", "dead", "unused", "used_range"):
        row[key] = codes.get(key)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _flip_row(path: str, flip: Flip) -> dict[str, Any]:
    return {"path": path, **{k: v for k, v in asdict(flip).items() if k != "image"}}


def _as_yaml(head: dict[str, Any], found: Found) -> str:
    tree = {
        **runs.finite(head),
        "layers": [_row(one) for one in found.layers],
        "flips": [_flip_row(path, flip) for path, flip in found.flips],
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _layers_csv(layers: Sequence[LayerComparison]) -> str:
    return _csv([_row(one) for one in layers])


FLIP_COLUMNS = (
    "path",
    "label",
    "float_prediction",
    "quantized_prediction",
    "float_margin",
    "quantized_margin",
)


def _flips_csv(found: Sequence[tuple[str, Flip]]) -> str:
    return _csv([_flip_row(path, flip) for path, flip in found], FLIP_COLUMNS)


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _layers_text(layers: Sequence[LayerComparison]) -> str:
    width = max(len(one.layer) for one in layers)
    head = f"{'layer':<{width}}  bits   SQNR  alone  saturated  codes unused  dead  range used"
    return "\n".join([head, *(_line(one, width) for one in layers)])


def _line(one: LayerComparison, width: int) -> str:
    bits = f"{one.weight_bits or '-'}/{one.output_bits or '-'}"
    start = f"{one.layer:<{width}}  {bits:<5}{_db(one.sqnr_db)} {_db(one.local_sqnr_db)}"
    if one.codes is None:
        return start.rstrip()
    codes = one.codes
    share, used = 100 * codes.saturated, 100 * codes.used_range
    return f"{start}{share:>9.3f} %{codes.unused:>14}{codes.dead:>6}{used:>10.1f} %"


def _db(value: float | None) -> str:
    return f"{'-' if value is None else 'equal' if value == math.inf else f'{value:.1f}':>6}"


def _flips_text(found: Found) -> str:
    share = 100 * len(found.flips) / found.images
    sqnr = "equal logits" if found.logit_sqnr_db == math.inf else f"logits SQNR {found.logit_sqnr_db:.1f} dB"
    lines = [f"{len(found.flips)} of {found.images} predictions flip ({share:.2f} %); {sqnr}"]
    if found.flips:
        lines.append(f"{'label':>7}{'float':>7}{'margin':>9}{'quantized':>11}{'margin':>9}  path")
    widest = sorted(found.flips, key=lambda item: -item[1].float_margin)
    for path, f in widest[:SHOWN]:
        lines.append(
            f"{f.label:>7}{f.float_prediction:>7}{f.float_margin:>9.3f}{f.quantized_prediction:>11}"
            f"{f.quantized_margin:>9.3f}  {path}"
        )
    if len(widest) > SHOWN:
        lines.append(f"{len(widest) - SHOWN} more, with smaller margins, in {FLIPS_FILE}")
    return "\n".join(lines)
