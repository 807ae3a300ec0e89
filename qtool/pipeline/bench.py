"""How fast a network is in all the forms that qtool gives it: one table, measured in one run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx

from qtool.config import Config
from qtool.deploy.engine import INT8, choose_engine
from qtool.deploy.native import convert
from qtool.deploy.native.files import from_file, to_file
from qtool.deploy.onnx import NEWEST_OPSET, float_model, qdq_model, to_model
from qtool.deploy.onnx.extra import PIP, has_extra
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.deploy.timing import Timing, added_memory_mib, time_in_turns
from qtool.errors import ConfigError, QtoolError
from qtool.graph.fast import fast
from qtool.graph.fold import fold_batch_norms
from qtool.pipeline import steps
from qtool.pipeline.inputs import Subject, open_subject, quantized_network
from qtool.pipeline.run_folder import run_folder
from qtool.pipeline.runs import RESULTS_FILE, Outcome, check_before_work
from qtool.pipeline.steps import example_input
from qtool.quantizers.checkpoint import to_checkpoint
from qtool.quantizers.prepare import QuantizedModel
from qtool.run_dir import write_text

LOG = logging.getLogger("qtool")

FLOAT = "float eager"
# Noise on which grids are found: the speed does not depend on them.
CALIBRATED_ON = 8
EIGHT_BIT_OPSET = 20

Network = Callable[[Tensor], object]


@dataclass(frozen=True)
class Variant:
    """One form of the network.

    Args:
        open: makes it, for a number of threads.
        size_bytes: of its file.
    """

    open: Callable[[int], Network]
    size_bytes: int


@dataclass(frozen=True)
class Row:
    """What was measured of one form, for one size of a batch and one number of threads."""

    threads: int
    name: str
    timing: Timing
    ratio: float
    size_bytes: int
    memory_mib: float | None


def bench(config: Config) -> Outcome:
    """Measure the speed of a network in all its forms."""
    check_before_work(config, data_needed=False)
    if config.run.chosen_device != "cpu":
        raise ConfigError(f"--device: measures on the CPU, not on {config.run.chosen_device}; leave it out")
    _check_threads(config)
    subject = open_subject(config)
    if subject.form not in ("float", "quantized"):
        raise ConfigError(
            f"--checkpoint: {subject.weights} runs in one form only; give the float network, or the "
            "quantized_checkpoint.pth.tar, to have all forms beside one another"
        )
    variants, missing = _variants(config, subject)
    for words in missing:
        LOG.info("%s", words)
    if not variants:
        raise ConfigError(f"--checkpoint: {subject.weights} has no form that can be measured")
    with run_folder(config) as folder:
        rows = _measured(config, subject, variants)
        record = {"bench": [_record(row) for row in rows], "missing": missing}
        write_text(folder / RESULTS_FILE, json.dumps(record, indent=2) + "\n")
    head = f"{subject.arch}, images of {'x'.join(map(str, subject.input_shape))}, in turns on this machine"
    return Outcome("\n".join([head, bench_table(rows), *missing, str(folder)]), folder, record)


def _check_threads(config: Config) -> None:
    cores = os.cpu_count() or 1
    if max(config.bench.threads) > cores:
        raise ConfigError(
            f"--threads: {max(config.bench.threads)} asked for, and this machine has {cores} processors; ask "
            "for fewer"
        )


def _variants(config: Config, subject: Subject) -> tuple[dict[str, Variant], list[str]]:
    """The forms that can be had, and why others cannot."""
    variants: dict[str, Variant] = {}
    missing: list[str] = []
    model = quantized_network(subject)
    traced = None if model is not None else subject.traced()
    if traced is not None:
        variants |= _float_variants(subject, traced)
        model = _quantized(config, subject, traced)
    else:
        missing.append("no float forms: a quantized checkpoint has no float weights")
    assert model is not None
    size = _size(to_checkpoint(model))
    variants["simulated"] = Variant(lambda _threads: model, size)
    attempts: dict[str, Callable[[], Variant | None]] = {
        "int8 engine": lambda: _int8(model, size),
        "native file": lambda: _native(model, subject),
        "onnxruntime float": lambda: None if traced is None else _onnx_float(subject, traced),
        "onnxruntime int8": lambda: _onnx(model, subject),
    }
    for name, attempt in attempts.items():
        if name.startswith("onnxruntime") and not (has_extra("onnx") and has_extra("onnxruntime")):
            missing.append(f"no {name}: {PIP}")
            continue
        try:
            found = attempt()
        except QtoolError as error:
            missing.append(f"no {name}: {error}")
            continue
        if found is not None:
            variants[name] = found
    return variants, missing


def _float_variants(subject: Subject, traced: fx.GraphModule) -> dict[str, Variant]:
    network, folded = subject.network, fast(traced).traced
    return {
        FLOAT: Variant(lambda _threads: network, _size(network.state_dict())),
        "float folded": Variant(lambda _threads: folded, _size(folded.state_dict())),
    }


def _quantized(config: Config, subject: Subject, traced: fx.GraphModule) -> QuantizedModel:
    asked = config.quantizers
    if asked.stats_file is not None:
        raise ConfigError("--qe-stats-file: the speed does not depend on ranges; leave it out")
    noise = _batch(subject, CALIBRATED_ON)
    stats = None if asked.dynamic else steps.calibrate(subject.network, [noise])
    return steps.quantize(traced, stats, asked, example=example_input(subject.input_shape))


def _size(content: Any) -> int:
    file = BytesIO()
    torch.save(content, file)
    return len(file.getvalue())


def _int8(model: QuantizedModel, size_bytes: int) -> Variant:
    network = choose_engine(model, INT8).network
    return Variant(lambda _threads: network, size_bytes)


def _native(model: QuantizedModel, subject: Subject) -> Variant:
    content = to_file(convert(model), example_input(subject.input_shape))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "native_int8.pt"
        path.write_bytes(content)
        network = from_file(path)
    return Variant(lambda _threads: network, len(content))


def _onnx(model: QuantizedModel, subject: Subject) -> Variant:
    # onnxruntime has integer kernels for weights of 8 bits, not of 4, which newer opsets write.
    bits = [grid.spec.num_bits for p in model.plan.layers.values() for grid in (p.weight, p.output) if grid]
    opset = NEWEST_OPSET if max(bits, default=8) > 8 else EIGHT_BIT_OPSET
    content = to_model(qdq_model(model, subject.input_shape, opset), subject.arch).SerializeToString()
    return Variant(lambda threads: OnnxNetwork(content, threads).eval(), len(content))


def _onnx_float(subject: Subject, traced: fx.GraphModule) -> Variant:
    folded = fold_batch_norms(traced).traced
    content = to_model(float_model(folded, subject.input_shape), subject.arch).SerializeToString()
    return Variant(lambda threads: OnnxNetwork(content, threads).eval(), len(content))


def _measured(config: Config, subject: Subject, variants: dict[str, Variant]) -> list[Row]:
    """A row for each form, batch size and number of threads."""
    asked = config.bench
    share = asked.seconds / (len(asked.threads) * len(asked.batch_sizes))
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in asked.threads:
            torch.set_num_threads(threads)
            networks = {name: variant.open(threads) for name, variant in variants.items()}
            for size in asked.batch_sizes:
                LOG.info("batches of %d, %d threads", size, threads)
                rows += _in_turns(networks, variants, _batch(subject, size), threads, share)
    finally:
        torch.set_num_threads(before)
    return rows


def _in_turns(
    networks: dict[str, Network], variants: dict[str, Variant], x: Tensor, threads: int, seconds: float
) -> list[Row]:
    memory = {name: added_memory_mib(network, x) for name, network in networks.items()}
    timings = time_in_turns(networks, x, seconds)
    reference = timings[next(iter(timings))].median_ms
    return [
        Row(threads, name, t, t.median_ms / reference, variants[name].size_bytes, memory[name])
        for name, t in timings.items()
    ]


def _batch(subject: Subject, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, *subject.input_shape, generator=generator)


def bench_table(rows: list[Row]) -> str:
    """The measurements for the terminal; ratios are to the first form of each block."""
    lines = []
    before = None
    for row in rows:
        block = (row.threads, row.timing.images)
        if block != before:
            words = f"threads {row.threads}, batch {row.timing.images}"
            lines.append(
                f"{words:<22}{'median ms':>10}{'p90 ms':>10}{'images/s':>10}{'ratio':>8}{'file MB':>9}"
                f"{'added MiB':>11}{'rounds':>8}"
            )
            before = block
        memory = "-" if row.memory_mib is None else f"{row.memory_mib:.1f}"
        t = row.timing
        lines.append(
            f"{row.name:<22}{t.median_ms:>10.2f}{t.p90_ms:>10.2f}{t.images_per_second:>10.1f}"
            f"{row.ratio:>8.3f}{row.size_bytes / 1e6:>9.2f}{memory:>11}{len(t.seconds):>8}"
        )
    return "\n".join(lines)


def _record(row: Row) -> dict[str, Any]:
    t = row.timing
    return {
        "threads": row.threads,
        "batch_size": t.images,
        "form": row.name,
        "median_ms": t.median_ms,
        "p90_ms": t.p90_ms,
        "images_per_second": t.images_per_second,
        "ratio": row.ratio,
        "size_bytes": row.size_bytes,
        "added_memory_mib": row.memory_mib,
        "rounds": len(t.seconds),
    }
