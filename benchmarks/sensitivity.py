"""What the sensitivity of every layer costs and is worth, on 64 images.

    QTOOL_DATA=... python benchmarks/sensitivity.py benchmarks/sensitivity.md

Each layer alone is quantized, weights (symmetric, per channel) and activations (asymmetric) to the bits of
the row, on 64 of the images that calibrate. Time: all that follows calibration, over one evaluation of the
float network on the same 64 images as `qtool evaluate` does it, image loading left out of both; in turns, in
one process, two threads, the median of the rounds. Agreement: estimates against the measurement of each layer
by running the network (`--exact`): rank correlation (Spearman), the difference's root mean square in dB, and
how many of the worst five both have.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch
from networks import NON_COMMERCIAL, load
from scipy.stats import spearmanr
from torch import Tensor

import qtool
from qtool.config import QuantizeConfig
from qtool.config.sections.sensitivity import LAYER, SensitivityConfig
from qtool.pipeline import steps
from qtool.pipeline.sensitivity.measuring import Measurer, Row, measure
from qtool.run_dir import write_text

NETWORKS = ("resnet18", "mobilenet_v2")
BITS = (8, 4)
METRICS = ("sqnr", "kl")
IMAGES = 64
ROUNDS = 5
THREADS = 2
WORST = 5


def settings(bits: int) -> QuantizeConfig:
    """What is asked of every layer."""
    return QuantizeConfig(
        mode="asym_u", mode_weights="sym", per_channel_weights=True, bits_weights=bits, bits_activations=bits
    )


def lines_of(name: str) -> list[str]:
    """The rows of one network."""
    subject = load(name)
    stats = qtool.calibrate(subject.traced, subject.calibration)
    images = torch.cat(subject.calibration)[:IMAGES]
    labels = torch.zeros(IMAGES).long()  # neither metric looks at them
    batches = [(images, labels)]
    lines = []
    for bits in BITS:
        for metric in METRICS:
            asked = SensitivityConfig(by=metric, per=LAYER)
            ratios, exact_ratios = [], []
            for round_ in range(ROUNDS):
                base = seconds_of_float(subject.traced, images, labels)
                rows, seconds = timed(subject.traced, stats, bits, batches, asked)
                ratios.append(seconds / base)
                if round_ == 0:
                    by_running = SensitivityConfig(by=metric, per=LAYER, exact=True)
                    exact, seconds = timed(subject.traced, stats, bits, batches, by_running)
                    exact_ratios.append(seconds / base)
            lines.append(line(name, bits, metric, rows, exact, statistics.median(ratios), exact_ratios[0]))
            click.echo(lines[-1])
    return lines


def seconds_of_float(network: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """The time of the float network on the images, in batches as a run makes them."""
    size = 32
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    return steps.evaluate(network, batches).seconds


def timed(traced, stats, bits, batches, asked) -> tuple[list[Row], float]:  # type: ignore[no-untyped-def]
    """The rows, and the seconds that they took."""
    start = time.perf_counter()
    with torch.no_grad():
        measurer = Measurer(traced, stats, settings(bits), batches, asked)
        rows = measure(measurer, 0, lambda shares: map(measurer, shares))
    return rows, time.perf_counter() - start


def line(
    name: str, bits: int, metric: str, rows: list[Row], exact: list[Row], ratio: float, exact_ratio: float
) -> str:
    """One row of the table."""
    measured = {row.group.name: row.score.harm(metric) for row in exact}
    found = np.array([row.score.harm(metric) for row in rows])
    wanted = np.array([measured[row.group.name] for row in rows])
    rank = spearmanr(found, wanted).statistic
    rms = float(np.sqrt(np.mean((10 * np.log10(found / wanted)) ** 2)))
    both = {row.group.name for row in rows[:WORST]} & {row.group.name for row in exact[:WORST]}
    cells = [name, str(len(rows)), f"W{bits}A{bits}", metric, f"{ratio:.1f}", f"{exact_ratio:.1f}"]
    return f"| {' | '.join(cells)} | {rank:.3f} | {rms:.2f} | {len(both)} |"


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
def main(result: Path) -> None:
    """Write the table to RESULT."""
    qtool.keep_freed_memory()
    torch.set_num_threads(THREADS)
    lines = [
        "# Sensitivity of layers",
        "",
        *(text.strip() for text in (__doc__ or "").strip().splitlines()),
        "",
    ]
    lines += [f"torch {torch.__version__}. {NON_COMMERCIAL}", ""]
    lines += ["| network | layers | bits | by | float evaluations | --exact | rank | rms, dB | of worst 5 |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name in NETWORKS:
        lines += lines_of(name)
    write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
