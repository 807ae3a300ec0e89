"""Every range estimator at 8, 6 and 4 bits: what it keeps of three networks.

    QTOOL_DATA=... python benchmarks/estimators.py benchmarks/estimators.md

Calibrated on 256 images of imagenet-sample (seed 0), evaluated on the 1,000 of imagenet-nips2017, which
share none with them. Activations: weights have 8 bits and one symmetric grid per channel, ranges by their
extremes; activations are asymmetric, one grid per tensor, with the bits of the column. Weights: activations
have 8 bits and ranges by their extremes. No corrections. In each cell top-1 in percent, and the
signal-to-noise ratio of the logits against the float network in dB. Evaluated on torch's int8 kernels
(`--engine int8`), calibrated once for each network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import torch
from networks import NON_COMMERCIAL, load

import qtool
from qtool.config import QuantizeConfig
from qtool.numerics.metrics import sqnr_db, top_k_correct
from qtool.numerics.spec import CLIP_MODES, WEIGHT_CLIP_MODES
from qtool.run_dir import write_text

NETWORKS = ("resnet18", "mobilenet_v2", "squeezenet1_1")
BITS = (8, 6, 4)
PERCENTILES = (99.9, 99.99, 99.999)


def settings() -> dict[str, dict[str, object]]:
    """The estimators by how they are called here."""
    found: dict[str, dict[str, object]] = {}
    for mode in CLIP_MODES:
        if mode == "percentile":
            found |= {
                f"percentile {p:g}": {"clip_activations": mode, "clip_percentile": p} for p in PERCENTILES
            }
        elif mode == "n_std":
            found |= {f"n_std {n:g}": {"clip_activations": mode, "clip_n_stds": n} for n in (2.0, 3.0)}
        else:
            found[mode] = {"clip_activations": mode}
    for mode in WEIGHT_CLIP_MODES:
        found[f"weights: {mode}"] = {"clip_weights": mode}
    return found


def measure(name: str) -> dict[str, dict[str, list[float]]]:
    """Top-1 and SQNR of one network, by estimator and bits."""
    subject = load(name)
    expected = subject.logits(subject.traced)
    stats = qtool.calibrate(subject.traced, subject.calibration)
    found = {"float": {"32": [100 * float(top_k_correct(expected, subject.labels, 1).double().mean()), 0.0]}}
    for label, chosen in settings().items():
        found[label] = {}
        for bits in BITS:
            what = "bits_weights" if "clip_weights" in chosen else "bits_activations"
            config = QuantizeConfig(
                mode_activations="asym_u",
                mode_weights="sym",
                per_channel_weights=True,
                **{what: bits},
                **chosen,
            )
            network = qtool.evaluator(qtool.quantize(subject.traced, stats, config), "int8")
            logits = subject.logits(network)
            top1 = 100 * float(top_k_correct(logits, subject.labels, 1).double().mean())
            found[label][str(bits)] = [top1, sqnr_db(expected, logits)]
            print(name, label, bits, found[label][str(bits)], file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, dict[str, list[float]]]], weights: bool) -> list[str]:
    """Rows for the estimators of activations, or of weights."""
    heads = [f"{name} {bits}" for name in found for bits in BITS]
    lines = ["| estimator | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for label in settings():
        if label.startswith("weights") != weights:
            continue
        cells = [found[name][label][str(bits)] for name in found for bits in BITS]
        texts = [f"{top1:.1f} ({db:.1f})" for top1, db in cells]
        lines.append(f"| {label.removeprefix('weights: ')} | " + " | ".join(texts) + " |")
    return lines


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--network", help="Print one network's numbers as JSON.")
def main(result: Path, network: str | None) -> None:
    """Write the tables to RESULT."""
    qtool.keep_freed_memory()
    if network is not None:
        click.echo(json.dumps(measure(network)))
        return
    found = {}
    for name in NETWORKS:
        command = [sys.executable, __file__, "-", "--network", name]
        found[name] = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
    floats = ", ".join(f"{name} {found[name]['float']['32'][0]:.1f}" for name in found)
    lines = ["# Range estimators", "", *(line.strip() for line in (__doc__ or "").strip().splitlines()), ""]
    lines += [f"torch {torch.__version__}. Float top-1: {floats}. {NON_COMMERCIAL}", ""]
    lines += ["## Activations", "", *table(found, False), "", "## Weights", "", *table(found, True)]
    write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
