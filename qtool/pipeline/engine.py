"""What evaluates the quantized network of a run, and how its integers differ from the simulation's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from qtool.config import Config
from qtool.config.sections.evaluation import ONNXRUNTIME
from qtool.data.loader import make_loader
from qtool.deploy.compiled import compiled
from qtool.deploy.engine import AUTO, INT8, SIMULATE, Engine, choose_engine
from qtool.deploy.native import INT8 as ON_KERNEL
from qtool.deploy.native import NativeModel
from qtool.deploy.onnx.simulation import simulation
from qtool.deploy.parity import parity, parity_text
from qtool.errors import ConfigError
from qtool.pipeline.conversion import NATIVE_LAYERS_FILE, layers_text, native_layers
from qtool.pipeline.inputs import Images, Subject
from qtool.pipeline.logits import logits_of
from qtool.pipeline.steps import evaluable
from qtool.quantizers.prepare import QuantizedModel
from qtool.run_dir import write_text

LOG = logging.getLogger("qtool")

PARITY_FILE = "parity.yaml"
# Evaluation images on which `auto` compares the layers.
COMPARED = 8


def check_engine(config: Config, subject: Subject) -> None:
    """Refuse an engine for a network that is not quantized, or already on int8 kernels.

    Raises:
        ConfigError: naming the flag.
    """
    asked = config.evaluation
    given = {
        f"--engine {asked.engine}": asked.engine != SIMULATE,
        f"--arithmetic {asked.arithmetic}": asked.arithmetic == ONNXRUNTIME,
        "--compile": asked.compile,
    }
    flag = next((flag for flag, is_given in given.items() if is_given), "")
    if flag and subject.form != "quantized":
        raise ConfigError(
            f"{flag}: {subject.weights} is {subject.form}; 'qtool evaluate' takes a quantized "
            "model that a run has saved, 'qtool quantize' quantizes first"
        )


def open_engine(config: Config, model: QuantizedModel, evaluation: Images) -> Engine:
    """What evaluates a quantized network, as a run's settings say; it says what was taken and why.

    Raises:
        ConfigError: if it cannot be had.
    """
    asked = config.evaluation.engine
    if config.evaluation.arithmetic == ONNXRUNTIME:
        engine = Engine(SIMULATE, simulation(model), "in onnxruntime's arithmetic")
        return _said(_compiled(config, engine, evaluation))
    if asked == SIMULATE:
        return _compiled(config, Engine(SIMULATE, model), evaluation)
    if asked == AUTO and config.run.chosen_device != "cpu":
        why = f"torch's int8 kernels run on the CPU, not on {config.run.chosen_device}"
        return _said(_compiled(config, Engine(SIMULATE, model, why), evaluation))
    images = next(first_batches(config, evaluation, COMPARED)) if asked == AUTO else None
    with torch.no_grad():
        engine = choose_engine(model, asked, images)
    return _said(engine if engine.name == INT8 else _compiled(config, engine, evaluation))


def _compiled(config: Config, engine: Engine, evaluation: Images) -> Engine:
    """The simulation through torch.compile if that is asked for; it says so where it is not to be had."""
    if not config.evaluation.compile:
        return engine
    device = config.run.chosen_device
    images = next(first_batches(config, evaluation, config.data.batch_size)).to(device)
    LOG.info("compiling the simulation; this takes a minute or more")
    network, why = compiled(evaluable(engine.network, device), images)
    if why:
        LOG.info("not compiled: %s", why)
        why = "; ".join(filter(None, [engine.why, f"not compiled: {why}"]))
        return replace(engine, why=why)
    return replace(engine, network=network, compiled=True)


def _said(engine: Engine) -> Engine:
    LOG.info("engine: %s%s", engine.name, f" ({engine.why})" if engine.why else "")
    if engine.native is not None:
        table = yaml.safe_dump(native_layers(engine.native), sort_keys=False)
        LOG.debug("layers on int8 kernels:\n%s", table)
    return engine


def write_engine(folder: Path, engine: Engine) -> None:
    """Write what became of the layers, if the engine is int8."""
    if engine.name == INT8:
        assert engine.native is not None
        write_text(folder / NATIVE_LAYERS_FILE, yaml.safe_dump(native_layers(engine.native), sort_keys=False))


def engine_text(engine: Engine) -> str:
    """What was taken, and what does not run on int8 kernels and why; "" for the simulation as asked."""
    if engine.name == INT8:
        assert engine.native is not None
        return f"engine int8, {layers_text(engine.native)}"
    words = "; ".join(filter(None, ["compiled" if engine.compiled else "", engine.why]))
    return f"engine simulate: {words}" if words else ""


def engine_record(config: Config, engine: Engine) -> dict[str, Any]:
    """The same for results.json."""
    record: dict[str, Any] = {"asked": config.evaluation.engine, "taken": engine.name}
    arithmetic = config.evaluation.arithmetic
    record |= {"arithmetic": arithmetic} if arithmetic == ONNXRUNTIME else {}
    record |= {"compiled": engine.compiled} if config.evaluation.compile else {}
    record |= {"why": engine.why} if engine.why else {}
    if engine.name == INT8 and engine.native is not None:
        layers = engine.native.layers.values()
        record |= {
            "backend": engine.native.target.backend,
            "layers": len(layers),
            "int8_layers": sum(layer.runs == ON_KERNEL for layer in layers),
            "share_of_macs": round(engine.work, 6),
        }
    return record


def verify(
    config: Config, folder: Path, model: QuantizedModel, native: NativeModel | None, evaluation: Images
) -> tuple[str, dict[str, Any]]:
    """Compare int8 kernels with the simulation on some evaluation images: in words, and for results.json.

    The comparison of every layer is written into the folder.
    """
    if config.evaluation.verify is None:
        return "", {}
    if native is None:
        return "--verify: nothing to compare, as the network has no int8 kernels", {}
    wanted = min(config.evaluation.verify, len(evaluation.indices))
    x = torch.cat(list(first_batches(config, evaluation, wanted)))
    simulated = evaluable(model, "cpu")
    with torch.no_grad():
        layers = parity(simulated, native, x)
        pairs = [
            (logits_of(simulated(part)), logits_of(native(part)))
            for part in torch.split(x, config.data.batch_size)
        ]
    same = torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs])
    table = {name: asdict(layer) for name, layer in layers.items()}
    write_text(folder / PARITY_FILE, yaml.safe_dump(table, sort_keys=False))
    different = [name for name, layer in layers.items() if layer.in_network.largest]
    record = {
        "images": len(x),
        "equal_predictions": int(same.sum()),
        "largest_difference": max((layer.in_network.largest for layer in layers.values()), default=0),
        "least_equal": min((layer.in_network.equal for layer in layers.values()), default=1.0),
        "first_different_layer": different[0] if different else None,
    }
    head = f"int8 kernels against the simulation on {len(x)} images: {int(same.sum())} predictions equal"
    return f"{head}\n{parity_text(layers)}", {"parity": record}


def first_batches(config: Config, evaluation: Images, count: int) -> Iterator[Tensor]:
    """The first evaluation images, count of them, fewer if some cannot be read."""
    size = min(count, config.data.batch_size)
    numbers = evaluation.indices[:count]
    # Too few to be worth processes of their own.
    for batch in make_loader(evaluation.dataset, batch_size=size, workers=0, indices=numbers):
        yield batch.images
