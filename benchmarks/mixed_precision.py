"""Bits for each layer against the same bits for all, at five bits per weight on average.

    QTOOL_DATA=... python benchmarks/mixed_precision.py benchmarks/mixed_precision.md

Weights are symmetric, one grid per channel; activations asymmetric with 8 bits. Calibrated on 256 images of
imagenet-sample; bits chosen on 64 of them by the estimated noise of each layer's weights at the logits;
evaluated on 256 images of imagenet-nips2017, which share none with these, by the simulation. SQNR is that of
the logits against the float network; agreement the share of equal predictions. All rows of a network and of
ranges have the same estimators; there are no corrections.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from networks import NON_COMMERCIAL, Subject, load
from torch import Tensor

import qtool
from qtool.config import QuantizeConfig, with_bits_of_layers
from qtool.graph.trace import layers
from qtool.numerics.metrics import sqnr_db, top_k_correct
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.mixed_precision.costs import MEAN, costs
from qtool.pipeline.mixed_precision.table import damage_table
from qtool.run_dir import write_text
from qtool.search.mixed_precision import choose_bits

NETWORKS = ("resnet18", "mobilenet_v2")
CHOICES = ((2, 4, 6, 8), (3, 4, 5, 6, 7, 8))
MEAN_BITS = 5
CHOSEN_ON, EVALUATED_ON = 64, 8  # images, and batches of 32
ESTIMATORS: dict[str, dict[str, str]] = {
    "extremes": {},
    "auto": {"clip_weights": "auto", "clip_activations": "auto"},
    "mse": {"clip_weights": "mse", "clip_activations": "mse"},
}


def settings(estimators: dict[str, str]) -> QuantizeConfig:
    """The same bits for all weights."""
    grids = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True}
    return QuantizeConfig(**grids, bits_weights=MEAN_BITS, **estimators)  # type: ignore[arg-type]


def mixed(subject: Subject, stats: ModelStats, config: QuantizeConfig, choices: tuple[int, ...]):  # type: ignore[no-untyped-def]
    """The settings with bits for each layer, and their average."""
    images = [torch.cat(subject.calibration)[:CHOSEN_ON]]
    table = damage_table(subject.traced, stats, config, images, choices, activations=False, seed=0)
    priced = costs(MEAN, table.traced, table.plan, table.tensors, table.knobs)
    choice = choose_bits(priced.knobs, MEAN_BITS * priced.unit)
    bits = {
        n: {"bits_weights": choice.bits[knob]} for knob, names in table.tensors.weights.items() for n in names
    }
    order = [name for name, _, _ in layers(subject.traced)]
    return with_bits_of_layers(config, order, bits), choice.cost / priced.unit


def lines_of(name: str) -> list[str]:
    """The rows of one network."""
    subject = load(name)
    stats = qtool.calibrate(subject.traced, subject.calibration)
    images = subject.images[:EVALUATED_ON]
    labels = subject.labels[: sum(map(len, images))]

    def logits(network: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(batch) for batch in images])

    expected = logits(subject.traced)
    lines = []
    for estimator, extra in ESTIMATORS.items():
        uniform = settings(extra)
        variants = {f"{MEAN_BITS} everywhere": (uniform, float(MEAN_BITS))}
        for choices in CHOICES:
            variants[f"of {', '.join(map(str, choices))}"] = mixed(subject, stats, uniform, choices)
        base = None
        for label, (config, average) in variants.items():
            found = logits(steps.quantize(subject.traced, stats, config))
            db = sqnr_db(expected, found)
            base = db if base is None else base
            top1 = 100 * float(top_k_correct(found, labels, 1).double().mean())
            agreement = 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())
            cells = [name, estimator, label, f"{average:.3f}", f"{db:.2f}", f"{db - base:+.2f}"]
            lines.append(f"| {' | '.join(cells)} | {top1:.1f} | {agreement:.1f} |")
            click.echo(lines[-1])
    return lines


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
def main(result: Path) -> None:
    """Write the table to RESULT."""
    qtool.keep_freed_memory()
    lines = ["# Mixed precision", "", *(text.strip() for text in (__doc__ or "").strip().splitlines()), ""]
    lines += [f"torch {torch.__version__}. {NON_COMMERCIAL}", ""]
    lines += ["| network | ranges | bits of weights | on average | SQNR, dB | gain, dB | top-1 | agreement |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in NETWORKS:
        lines += lines_of(name)
    write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
