"""A network into a form that other programs read, and how what they compute differs from qtool's."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from qtool.config import Config
from qtool.config.sections.export import ENCODINGS, ONNX, ONNX_FLOAT, PT2E, ExportConfig
from qtool.deploy.onnx import Written, float_model, qdq_model, to_model
from qtool.deploy.onnx.encodings import encodings
from qtool.deploy.onnx.extra import load_extra
from qtool.deploy.onnx.files import to_bytes
from qtool.deploy.onnx.parity import differences_text, onnx_parity
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.onnx.simulation import simulation
from qtool.deploy.pt2e import files as program_files
from qtool.deploy.pt2e import reference, to_program
from qtool.deploy.pt2e.lowered import int8_operations, load_lowering, lowered
from qtool.deploy.pt2e.parity import program_parity
from qtool.errors import ConfigError
from qtool.graph.fold import fold_batch_norms
from qtool.pipeline.engine import first_batches
from qtool.pipeline.inputs import (
    Images,
    Subject,
    model_info,
    open_evaluation,
    open_subject,
    quantized_network,
)
from qtool.pipeline.passes import evaluate_images
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.runs import RESULTS_FILE, Outcome, check_before_work, finite
from qtool.pipeline.steps import example_input
from qtool.quantizers.prepare import QuantizedModel
from qtool.report import compare, table
from qtool.run_dir import write_text, write_whole

LOG = logging.getLogger("qtool")

FILES = {
    ONNX: "quantized.onnx",
    ONNX_FLOAT: "float.onnx",
    ENCODINGS: "encodings.json",
    PT2E: "quantized.pt2",
}
# Images whose integers are compared layer by layer; every layer's are in memory at once.
COMPARED = 8


@dataclass(frozen=True)
class Export:
    """A network in another form.

    Args:
        content: of the file.
        network: the file's, as far as it can be run; None for grids alone.
        record: of what was written, for results.json.
        differences: layer by layer, given a batch: in words, and for results.json.
        name: of its results.
        runner: what runs it, in words.
        simulated: what it is compared with; None is the network as it was opened.
        words: on that, or "".
    """

    content: bytes
    network: nn.Module | None
    record: dict[str, Any]
    differences: Callable[[torch.Tensor], tuple[str, dict[str, Any]]] | None = None
    name: str = "onnx"
    runner: str = "onnxruntime"
    simulated: nn.Module | None = None
    words: str = ""


def export(config: Config) -> Outcome:
    """Write a network in another form, and compare on images what the file computes."""
    asked = config.export
    verifies = _check(config)
    check_before_work(config, data_needed=verifies)
    subject = open_subject(config)
    _check_form(asked, subject)
    images = _images(config, subject) if verifies else None
    made = _EXPORTERS[asked.format](config, subject)
    with run_folder(config) as folder:
        LOG.info("network: %s, %s", subject.arch, subject.weights)
        prefix = f"{config.run.name}_" if config.run.name else ""
        path = folder / f"{prefix}{FILES[asked.format]}"
        write_whole(path, lambda file: file.write(made.content))
        record: dict[str, Any] = {"export": {"format": asked.format, "file": path.name, **made.record}}
        lines = [f"{subject.arch}: {asked.format}, {len(made.content) / 1e6:.2f} MB, {path}"]
        if images is not None:
            text, more = _compared(config, subject, made, images)
            lines.append(text)
            record |= more
        write_text(folder / RESULTS_FILE, json.dumps(finite(record), indent=2) + "\n")
    return Outcome("\n".join([*lines, str(folder)]), folder, record)


def _check(config: Config) -> bool:
    """Whether the file is to be compared; refuse before any work what cannot be had.

    Raises:
        ConfigError: naming the flag.
    """
    asked = config.export
    is_onnx = asked.format in (ONNX, ONNX_FLOAT)
    if not is_onnx and asked.opset != ExportConfig.opset:
        raise ConfigError("--opset: is of --format onnx and onnx-float; leave it out")
    verifies = asked.compared_images is not None or config.data.path is not None
    _check_lowering(asked, verifies)
    if asked.format == ENCODINGS:
        if asked.compared_images is not None:
            raise ConfigError("--verify: grids alone compute nothing; --format onnx can be compared")
        return False
    if is_onnx:
        load_extra("onnx", f"--format {asked.format}")
    if verifies:
        if is_onnx:
            load_extra("onnxruntime", "--verify")
        if config.run.chosen_device != "cpu":
            raise ConfigError(
                f"--device: compares on the CPU, not on {config.run.chosen_device}; leave it out"
            )
    return verifies


def _check_lowering(asked: ExportConfig, verifies: bool) -> None:
    if not asked.lower:
        return
    if asked.format != PT2E:
        raise ConfigError(f"--lower: is of --format {PT2E}; leave it out")
    if not verifies:
        raise ConfigError("--lower: what is compiled is compared, not written; add DATA or --verify N")
    load_lowering()


def _check_form(asked: ExportConfig, subject: Subject) -> None:
    """Refuse a network of which there is no such form.

    Raises:
        ConfigError: naming the format.
    """
    wanted = "float" if asked.format == ONNX_FLOAT else "quantized"
    if subject.form != wanted:
        advice = (
            "give the float weights with -a and --checkpoint"
            if wanted == "float"
            else "'qtool quantize' makes a quantized_checkpoint.pth.tar; give that with --checkpoint"
        )
        found = subject.form if subject.form == "float" else f"a {subject.form} network"
        raise ConfigError(f"--format {asked.format}: {subject.weights} is {found}; {advice}")


def _images(config: Config, subject: Subject) -> Images:
    evaluation = open_evaluation(config, subject)
    wanted = config.export.compared_images or len(evaluation.indices)
    if wanted >= len(evaluation.indices):
        return evaluation
    words = f"the first {wanted} of {evaluation.words}"
    return replace(evaluation.part(range(wanted)), words=words)


def _quantized(config: Config, subject: Subject) -> Export:
    model = quantized_network(subject)
    assert model is not None
    written = qdq_model(model, subject.input_shape, config.export.opset)
    proto = to_model(written, subject.arch)

    simulated = simulation(model)

    def differences(x: torch.Tensor) -> tuple[str, dict[str, Any]]:
        layers = onnx_parity(simulated, written, proto, x)
        found = {name: asdict(layer) for name, layer in layers.items()}
        return f"{differences_text(layers)}, on {len(x)} images", {"layers": found}

    bare = proto.SerializeToString()
    info = {"opset": config.export.opset, "layers": _layers(model)}
    content = to_bytes(proto, {"model": model_info(subject, subject.num_outputs()), **info})
    words = "qtool's simulation in onnxruntime's arithmetic, as --arithmetic onnxruntime evaluates it"
    return Export(content, _runnable(config, bare), info, differences, simulated=simulated, words=words)


def _layers(model: QuantizedModel) -> dict[str, dict[str, Any]]:
    """How each layer computes, in how many bits: a file's integer types are wider than some grids."""
    found = {}
    for name, layer in model.plan.layers.items():
        entry: dict[str, Any] = {"op": layer.op, "computes": layer.kind}
        entry |= {} if layer.weight is None else {"bits_weights": layer.weight.spec.num_bits}
        entry |= {} if layer.output is None else {"bits_activations": layer.output.spec.num_bits}
        found[name] = entry
    return found


def _float(config: Config, subject: Subject) -> Export:
    written: Written = float_model(
        fold_batch_norms(subject.traced()).traced, subject.input_shape, config.export.opset
    )
    proto = to_model(written, subject.arch)
    bare = proto.SerializeToString()
    info = {"opset": config.export.opset}
    content = to_bytes(proto, {"model": model_info(subject, subject.num_outputs()), **info})
    return Export(content, _runnable(config, bare), info)


def _runnable(config: Config, content: bytes) -> nn.Module | None:
    """The network in onnxruntime, if it is to be run."""
    return OnnxNetwork(content).eval() if _check(config) else None


def _program(config: Config, subject: Subject) -> Export:
    model = quantized_network(subject)
    assert model is not None
    network = reference(model)
    program = to_program(network, example_input(subject.input_shape))

    def differences(x: torch.Tensor) -> tuple[str, dict[str, Any]]:
        layers = program_parity(model, network, x)
        found = {name: asdict(layer) for name, layer in layers.items()}
        return f"{differences_text(layers)}, on {len(x)} images", {"layers": found}

    info: dict[str, Any] = {"layers": _layers(model)}
    content = program_files.to_bytes(program, {"model": model_info(subject, subject.num_outputs()), **info})
    runnable, runner = program.module(), "torch.export"
    if config.export.lower:
        LOG.info("lowering the program to int8 kernels; this takes a minute or more")
        size = config.data.batch_size
        runnable = lowered(runnable, torch.zeros(size, *subject.input_shape))
        runner = f"torchao on {int8_operations()} int8 kernels"
        info["lowered"] = {"batch_size": size, "int8_kernels": int8_operations()}
    wrapped = program_files.ProgramNetwork(runnable, {}).eval()
    return Export(content, wrapped, info, differences, PT2E, runner)


def _encodings(_config: Config, subject: Subject) -> Export:
    model = quantized_network(subject)
    assert model is not None
    found = encodings(model)
    counts = {key: len(found[key]) for key in ("activation_encodings", "param_encodings")}
    return Export((json.dumps(found, indent=2) + "\n").encode("utf-8"), None, counts)


_EXPORTERS: dict[str, Callable[[Config, Subject], Export]] = {
    ONNX: _quantized,
    ONNX_FLOAT: _float,
    ENCODINGS: _encodings,
    PT2E: _program,
}


def _compared(config: Config, subject: Subject, made: Export, images: Images) -> tuple[str, dict[str, Any]]:
    """What qtool and what runs the file give for some images: in words, and for results.json."""
    assert made.network is not None
    ours, theirs = subject.form, made.name
    results = {
        ours: evaluate_images(config, made.simulated or subject.network, images, f"evaluating {ours}"),
        theirs: evaluate_images(config, made.network, images, f"evaluating {theirs}"),
    }
    comparison = compare(results[ours], results[theirs])
    head = f"qtool and {made.runner} on {images.words}"
    lines = [*filter(None, [head, made.words]), table(results, comparison)]
    record: dict[str, Any] = {name: result.as_dict() for name, result in results.items()}
    record |= comparison.as_dict()
    if made.differences is not None:
        x = torch.cat(list(first_batches(config, images, COMPARED)))
        text, more = made.differences(x)
        lines.append(text)
        record |= more
    return "\n".join(lines), record
