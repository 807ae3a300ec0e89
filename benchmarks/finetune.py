"""What training brings back of resnet20's accuracy at few bits, and how long it takes.

    QTOOL_DATA=... python benchmarks/finetune.py benchmarks/finetune.json benchmarks/finetune.md

Each row is a `qtool finetune` of resnet20: trained on nine tenths of train-5085 (4,577 images; the other 508
are held out, seed 0), evaluated on the 1,017 images of test-1017. Weights: one symmetric grid per channel;
activations: one asymmetric grid per tensor; ranges at the start by the estimators `auto`. Rates and steps
were chosen by the loss on the held-out images, see below; the test images chose nothing.

A row that is killed goes on where it was when the command is given again; one that is done is not made again.
Seconds are those of training, and of the whole command, by the clock: too high beside other work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from networks import data_folder

from qtool.run_dir import write_text

GRIDS = "--qe-mode-acts asym_u --qe-mode-wts sym --qe-per-channel --qe-clip-acts auto --qe-clip-wts auto"
OF_FOUR_BITS = "--steps 500"
OF_TWO_BITS = "--steps 1500 --lr 0.01"


@dataclass(frozen=True)
class Row:
    """A network that is trained.

    Args:
        weights, activations: bits.
        ends: bits of the first and the last layer; None for those of all.
        settings: of training.
    """

    weights: int
    activations: int
    ends: int | None
    settings: str

    @property
    def name(self) -> str:
        """For files, and for --only."""
        ema = "-ema" if "ema" in self.settings else ""
        return f"w{self.weights}a{self.activations}-ends{self.ends or 'asall'}{ema}"

    @property
    def flags(self) -> list[str]:
        """Of the command, without images and output."""
        bits = ["--qe-bits-wts", str(self.weights), "--qe-bits-acts", str(self.activations)]
        ends = [] if self.ends is None else ["--first-last-bits", str(self.ends)]
        return [*GRIDS.split(), *bits, *ends, *self.settings.split()]


ROWS = (
    Row(4, 4, 8, OF_FOUR_BITS),
    Row(2, 4, 8, OF_TWO_BITS),
    Row(4, 4, None, OF_FOUR_BITS),
    Row(2, 4, None, OF_TWO_BITS),
    Row(4, 4, 8, f"{OF_FOUR_BITS} --step-sizes ema"),
)

# What the loss on the held-out images was, in nats, when rates were chosen: W2A4, ends of 8 bits.
CHOSEN = """
| steps | batch | rate | rate of scales | temperature | held-out loss | held-out top-1 |
|---|---|---|---|---|---|---|
| 200 | 64 | 0.03 | 0.01 | 1 | 2.052 | 20.1 |
| 200 | 64 | 0.01 | 0.01 | 1 | 0.948 | 66.5 |
| 200 | 64 | 0.003 | 0.01 | 1 | 1.383 | 46.3 |
| 200 | 64 | 0.01 | 0.003 | 1 | 0.931 | 66.5 |
| 400 | 64 | 0.01 | 0.005 | 1 | 0.323 | 89.4 |
| 400 | 64 | 0.01 | 0.005 | 3 | 0.493 | 87.8 |
| 800 | 32 | 0.01 | 0.005 | 1 | 0.294 | 89.8 |
| 1500 | 64 | 0.01 | 0.005 | 1 | 0.228 | 92.1 |
"""


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """The numbers of a row; an earlier run of it that was ended goes on."""
    cifar = data_folder() / "cifar10"
    out = folder / row.name
    command = [sys.executable, "-m", "qtool", "finetune", "-a", "resnet20"]
    command += ["--checkpoint", str(cifar / "resnet20.pth"), *row.flags]
    command += ["--train-data", str(cifar / "train-5085.npz"), str(cifar / "test-1017.npz"), "-o", str(out)]
    states = sorted(out.glob("*/training_state.pt"), key=lambda path: path.stat().st_mtime)
    if states:
        command += ["--resume-training-from", str(states[-1].parent)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    results = max(out.glob("*/results.json"), key=lambda path: path.stat().st_mtime)
    found = json.loads(results.read_text())
    return {
        "float_top1": found["float"]["top1"],
        "start_top1": found["finetuning"]["start"]["top1"],
        "top1": found["quantized"]["top1"],
        "standard_error": found["top1_standard_error"],
        "held_out": [found["finetuning"][f"held_out_loss_{when}"] for when in ("before", "after")],
        "training_seconds": found["finetuning"]["seconds"],
        "resumed": found["finetuning"]["resumed"],
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The rows that have been measured, with their commands."""
    lines = [
        "| bits | ends | settings | float | start | trained | drop | held-out loss | training, s | all, s |",
        "|---" * 10 + "|",
    ]
    for row in ROWS:
        values = found.get(row.name)
        if values is None:
            continue
        drop = values["top1"] - values["float_top1"]
        before, after = values["held_out"]
        resumed = f", resumed at step {values['resumed']}" if values["resumed"] else ""
        lines.append(
            f"| W{row.weights}A{row.activations} | {row.ends or 'as all'} | {row.settings} "
            f"| {values['float_top1']:.2f} | {values['start_top1']:.2f} | {values['top1']:.2f} "
            f"| {drop:+.2f} ± {values['standard_error']:.2f} | {before:.3g} -> {after:.3g} "
            f"| {values['training_seconds']:.0f} (threads: {values['threads']}{resumed}) "
            f"| {values['seconds']:.0f} |"
        )
    flags = " ".join(ROWS[0].flags)
    return [
        *lines,
        "",
        "The command of the first row; the others have other bits and settings:",
        "",
        f"    qtool finetune -a resnet20 --checkpoint resnet20.pth {flags} \\",
        "        --train-data train-5085.npz test-1017.npz",
    ]


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--runs", type=click.Path(path_type=Path), default=Path("logs/finetune"), help="For the runs.")
@click.option("--only", default="", help="Make rows with this in their name.")
def main(record: Path, result: Path, runs: Path, only: str) -> None:
    """Make all rows that RECORD lacks, and write the table to RESULT."""
    found = json.loads(record.read_text()) if record.is_file() else {}
    for row in ROWS:
        if row.name not in found and only in row.name:
            found[row.name] = measure(row, runs)
            write_text(record, json.dumps(found, indent=1) + "\n")
            click.echo(f"{row.name}: {found[row.name]['top1']:.2f}", err=True)
    lines = ["# Training at few bits", "", *(line.strip() for line in (__doc__ or "").strip().splitlines())]
    lines += ["", f"torch {torch.__version__}.", "", *table(found), "", "## How rates were chosen", ""]
    lines += ["By trials on one thread at W2A4, ends of 8 bits:", "", *CHOSEN.strip().splitlines()]
    write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
