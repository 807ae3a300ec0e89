"""A quantized network onto torch's int8 kernels, as part of a run: its file, its table, its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import fx

from qtool.config import Config
from qtool.deploy.native import IN_FLOAT, INT8, NativeModel, Target, convert
from qtool.deploy.native.files import to_file
from qtool.deploy.native.reduce import reduce_ranges
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.pipeline.inputs import Subject, model_info
from qtool.pipeline.steps import example_input
from qtool.quantizers.prepare import QuantizedModel, quantize_graph
from qtool.report import Comparison
from qtool.run_dir import write_text, write_whole

LOG = logging.getLogger("qtool")

NATIVE_FILE = "native_int8.pt"
NATIVE_LAYERS_FILE = "native_layers.yaml"
# Layers that are named with the reason why they are on no int8 kernel.
NAMED = 10


def open_target(config: Config) -> Target | None:
    """Where the network is to be converted to, or None; found out before any long work.

    Raises:
        ConfigError: if this build of torch lacks the engine.
    """
    return Target.here(config.conversion.pytorch_backend) if config.conversion.convert_pytorch else None


def with_reduced_ranges(
    traced: fx.GraphModule, stats: ModelStats, model: QuantizedModel, specs: Mapping[str, LayerSpec]
) -> tuple[QuantizedModel, Mapping[str, LayerSpec]]:
    """Quantize again with 7 bits for the activations that need it."""
    reduced, words = reduce_ranges(model, specs)
    if not words:
        LOG.info("--qe-reduce-range: no activations need it")
        return model, specs
    LOG.info("--qe-reduce-range: 7 bits for %d activations, such as %s", len(words), words[0])
    return quantize_graph(traced, stats, reduced), reduced


def convert_network(model: QuantizedModel, target: Target) -> NativeModel:
    """Convert a network, and log what is to be known about the result.

    Raises:
        ConfigError: if it cannot be converted.
    """
    native = convert(model, target)
    count = sum(layer.runs == INT8 for layer in native.layers.values())
    LOG.info("%d of %d layers run on %s's int8 kernels", count, len(native.layers), target.backend)
    risky = [name for name, layer in native.layers.items() if layer.saturating]
    if risky and target.backend != "qnnpack":
        first = native.layers[risky[0]]
        LOG.warning(
            "on processors without VNNI, sums of %d layers could saturate, such as %s (%d output channels); "
            "for those quantize with --qe-reduce-range",
            len(risky),
            risky[0],
            first.saturating,
        )
    return native


def write_native(config: Config, folder: Path, subject: Subject, native: NativeModel, classes: int) -> Path:
    """Write the network as a file that loads without qtool, and what became of its layers."""
    write_text(folder / NATIVE_LAYERS_FILE, yaml.safe_dump(native_layers(native), sort_keys=False))
    content = to_file(native, example_input(subject.input_shape), **model_info(subject, classes))
    prefix = f"{config.run.name}_" if config.run.name else ""
    return write_whole(folder / f"{prefix}{NATIVE_FILE}", lambda file: file.write(content))


def native_layers(native: NativeModel) -> dict[str, dict[str, Any]]:
    """What became of each layer, as plain values."""
    found = {}
    for name, layer in native.layers.items():
        entry: dict[str, Any] = {"op": layer.op, "runs": layer.runs}
        entry |= {"why": layer.why} if layer.why else {}
        if layer.container is not None:
            c = layer.container
            entry |= {"scale": c.scale, "zero_point": c.zero_point, "largest_integer": c.high}
        entry |= {"channels_that_need_vnni": layer.saturating} if layer.saturating else {}
        found[name] = entry
    return found


def conversion_text(native: NativeModel, comparison: Comparison) -> str:
    """What was converted, what was not and why, and how the result compares with the simulation."""
    return layers_text(native, f"; {comparison.agreement:.3f} % of predictions equal the simulation's")


def layers_text(native: NativeModel, more: str = "") -> str:
    """What runs on int8 kernels, with more to say of that, and what does not and why."""
    layers = native.layers
    others = {name: layer for name, layer in layers.items() if layer.runs != INT8}
    lines = [
        f"{native.target.backend}: {len(layers) - len(others)} of {len(layers)} layers on int8 kernels{more}"
    ]
    for name, layer in list(others.items())[:NAMED]:
        how = "in float" if layer.runs == IN_FLOAT else layer.runs
        lines.append(f"not: {name}, {layer.op}, {how} ({layer.why})")
    if len(others) > NAMED:
        lines.append(f"not: {len(others) - NAMED} more, see {NATIVE_LAYERS_FILE}")
    return "\n".join(lines)


def conversion_record(native: NativeModel, comparison: Comparison) -> dict[str, Any]:
    """The same for results.json."""
    return {
        "backend": native.target.backend,
        "vnni": native.target.vnni,
        "layers": len(native.layers),
        "int8_layers": sum(layer.runs == INT8 for layer in native.layers.values()),
        "agreement_with_simulation": comparison.agreement,
        "top1_difference_from_simulation": comparison.top1_difference,
    }
