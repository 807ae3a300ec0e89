"""What corrections and presets keep of the accuracy, at several bit widths.

    QTOOL_DATA=... python benchmarks/accuracy.py benchmarks/accuracy.json benchmarks/accuracy.md

Networks and splits are those of benchmarks/networks.py. Weights: one symmetric grid per channel; activations:
one asymmetric grid per tensor. Where bits are below 8 the first and the last layer have 8, unless a row says
"as all". Seconds are those of quantizing, calibration included, and rough. Every row is computed in a process
of its own, written to the JSON file when it is done, and not computed again; rows it lacks are not shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from networks import CIFAR, NON_COMMERCIAL, load
from torch import fx

import qtool
from qtool.config import CorrectionsConfig, QuantizeConfig
from qtool.graph.trace import layers
from qtool.numerics.metrics import paired_standard_error, sqnr_db
from qtool.observers.stats import ModelStats
from qtool.pipeline.corrections import decide, quantize_corrected
from qtool.run_dir import write_text

PRESETS = ("none", "fast", "accurate", "best")
METHODS = (
    "equalization",
    "channel_alignment",
    "fast_bias_correction",
    "bias_correction",
    "weight_correction",
    "activation_ranges",
    "gptq",
    "adaround",
    "reconstruction",
)
SCHEMES = ((8, 8), (6, 6), (4, 8), (4, 4))
SUMS_AND_IMAGE = "none, image"
WORDS_OF_SUMS = {
    "": "",
    "none": ", sums in float",
    SUMS_AND_IMAGE: ", sums in float, image on 16 bits",
    "sum": ", summands rounded",
}


@dataclass(frozen=True)
class Row:
    """One quantized network that is measured.

    Args:
        network, split: see networks.load.
        weights, activations: bits.
        ends: bits of the first and the last layer; None for those of all.
        preset: of qtool, or "" with a method.
        method: a correction alone, or "".
        per_tensor: whether weights have one grid for all channels.
        sums: how additions round, as --qe-add-rounding; "" for what the preset chooses; SUMS_AND_IMAGE:
            not at all, and the image has 16 bits.
    """

    network: str
    split: str
    weights: int
    activations: int
    ends: int | None
    preset: str = ""
    method: str = ""
    per_tensor: bool = False
    sums: str = ""

    @property
    def key(self) -> str:
        """The row as text."""
        return " ".join(str(v) for v in asdict(self).values())


def rows() -> list[Row]:
    """All rows, the quick ones first."""
    found = []
    for name in (*CIFAR[::2], "resnet56", "squeezenet1_1", "mobilenet_v2", "resnet18", "resnet50"):
        for w, a in SCHEMES:
            ends = None if min(w, a) == 8 else 8
            if name != "resnet20_distiller":
                found += [Row(name, "nips", w, a, ends, preset) for preset in PRESETS]
        if name != "resnet20_distiller":
            found += [Row(name, "nips", 4, 8, 8, method=method) for method in METHODS]
    for preset in ("none", "fast"):
        found.append(Row("mobilenet_v2", "nips", 8, 8, None, preset, per_tensor=True))
    peers = {
        "resnet20": ((8, 8), (6, 6), (4, 8), (4, 4)),
        "resnet20_distiller": ((4, 8), (4, 4)),
        "mobilenet_v2": ((8, 8), (4, 8)),
        "resnet18": ((8, 8),),
    }
    for name, schemes in peers.items():
        for w, a in schemes:
            found += [Row(name, "peers", w, a, None, preset) for preset in ("accurate", "best")]
            if (w, a) == (8, 8):
                in_float = ("none", SUMS_AND_IMAGE) if name == "resnet20" else ("none",)
                found += [
                    Row(name, "peers", 8, 8, None, preset, sums=sums)
                    for sums in in_float
                    for preset in ("accurate", "best")
                ]
                found.append(Row(name, "peers", 8, 8, None, "best", sums="sum"))
    return found


def measure(row: Row) -> dict[str, Any]:
    """The numbers of a row."""
    subject = load(row.network, row.split)
    expected = subject.logits(subject.traced)
    sums, overrides = row.sums, {}
    if sums == SUMS_AND_IMAGE:
        first = next(name for name, node, _ in layers(subject.traced) if node.meta["op"] == "conv")
        sums, overrides = "none", {first: {"input_overrides": {0: {"bits_activations": 16}}}}
    quantizers = QuantizeConfig(
        mode_activations="asym_u",
        mode_weights="sym",
        per_channel_weights=not row.per_tensor,
        bits_weights=row.weights,
        bits_activations=row.activations,
        first_last_bits=row.ends,
        add_rounding=sums or QuantizeConfig.add_rounding,
        overrides=overrides,
    )
    asked = CorrectionsConfig(
        preset=row.preset or None, methods=(row.method,) if row.method else (), images=10**6
    )
    start = time.perf_counter()
    corrections = decide(subject.traced, quantizers, asked)

    def calibrate(network: fx.GraphModule) -> ModelStats:
        return qtool.calibrate(network, subject.calibration)

    done = quantize_corrected(subject.traced, corrections, subject.calibration, calibrate)
    seconds = time.perf_counter() - start
    logits = subject.logits(qtool.evaluator(done.model, "int8"))
    right, float_right = (x.argmax(1) == subject.labels for x in (logits, expected))
    return {
        "images": len(logits),
        "calibration": sum(len(batch) for batch in subject.calibration),
        "float_top1": 100 * float(float_right.double().mean()),
        "top1": 100 * float(right.double().mean()),
        "standard_error": 100 * paired_standard_error(float_right, right),
        "agreement": 100 * float((logits.argmax(1) == expected.argmax(1)).double().mean()),
        "sqnr_db": sqnr_db(expected, logits),
        "seconds": seconds,
        "methods": {m["method"]: m["seconds"] for m in done.record["methods"]},
    }


def tables(found: dict[str, dict[str, Any]]) -> list[str]:
    """The rows that have been measured, as tables."""
    head = "| bits | ends | corrections | top-1 | difference | agreement | SQNR, dB | seconds |"
    lines: list[str] = []
    title = ""
    for row in rows():
        values = found.get(row.key)
        if values is None:
            continue
        wanted = f"{row.network}, split {row.split}"
        if wanted != title:
            title = wanted
            what = f"float top-1 {values['float_top1']:.2f} on {values['images']} images"
            lines += ["", f"## {title}", "", f"{what}, calibrated on {values['calibration']}.", "", head]
            lines.append("|---" * 8 + "|")
        name = row.preset or row.method
        name += ", weights per tensor" if row.per_tensor else ""
        name += WORDS_OF_SUMS[row.sums]
        change = values["top1"] - values["float_top1"]
        lines.append(
            f"| W{row.weights}A{row.activations} | {row.ends or 'as all'} | {name} | {values['top1']:.2f} "
            f"| {change:+.2f} ± {values['standard_error']:.2f} | {values['agreement']:.1f} "
            f"| {values['sqnr_db']:.1f} | {values['seconds']:.0f} |"
        )
    return lines


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path), required=False)
@click.option("--row", type=int, help="Measure one row, and print its numbers as JSON.")
@click.option("--only", default="", help="Measure rows with these words in their key.")
def main(record: Path, result: Path | None, row: int | None, only: str) -> None:
    """Measure all rows that RECORD lacks, and write the tables to RESULT."""
    qtool.keep_freed_memory()
    if row is not None:
        click.echo(json.dumps(measure(rows()[row])))
        return
    found = json.loads(record.read_text()) if record.is_file() else {}
    for number, one in enumerate(rows()):
        if one.key in found or only not in one.key:
            continue
        command = [sys.executable, __file__, str(record), "--row", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            click.echo(f"{one.key}: failed", err=True)
            continue
        found[one.key] = json.loads(done.stdout)
        write_text(record, json.dumps(found, indent=1) + "\n")
        values = found[one.key]
        click.echo(
            f"{one.key}: {values['top1']:.2f} {values['agreement']:.1f} {values['sqnr_db']:.1f}", err=True
        )
    if result is not None:
        lines = ["# Accuracy", "", *(line.strip() for line in (__doc__ or "").strip().splitlines()), ""]
        lines += [f"torch {torch.__version__}. {NON_COMMERCIAL}", *tables(found)]
        write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
