"""Tuning to half a point of top-1: what it tries, what it ends with, and how long it takes.

    QTOOL_DATA=... python benchmarks/tuning.py benchmarks/tuning.md [--images N] [--only NAME]

Calibrated on 256 images of imagenet-sample (seed 0), tuned on images of imagenet-nips2017, which share none
with them: all 1,000 unless --images says otherwise. Both networks keep one scale per tensor. Each row is one
run of `qtool tune --max-drop 0.5`; the last one may change modes alone, and cannot meet its goal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from qtool.run_dir import write_text

TUNED = "modes,estimators,ends,corrections,groups"
MOBILENET = ("-a", "mobilenet_v2", "--crop", "225")
RESNET = ("-a", "resnet18", "--qe-bits-wts", "6", "--qe-bits-acts", "6")
IMAGES = 1000
NON_COMMERCIAL = (
    "The weights of resnet18 are under a non-commercial licence: github "
    "uber-research/permute-quantize-finetune, Uber Non-Commercial License."
)


@dataclass(frozen=True)
class Run:
    """One tuning.

    Args:
        name: of the row.
        network: flags of the network, with --arch first.
        strategy: by its name.
        more: further flags.
    """

    name: str
    network: tuple[str, ...]
    strategy: str
    more: tuple[str, ...] = ("--tuned", TUNED)


RUNS = (
    Run("mobilenet_v2 W8A8, basic", MOBILENET, "basic"),
    Run("mobilenet_v2 W8A8, greedy-revert", MOBILENET, "greedy-revert"),
    Run("resnet18 W6A6, basic", RESNET, "basic"),
    Run("resnet18 W6A6, greedy-revert", RESNET, "greedy-revert"),
    Run("mobilenet_v2 W8A8, modes alone", MOBILENET, "exhaustive", ("--tuned", "modes")),
)


def command(run: Run, images: int, folder: Path) -> list[str]:
    """The command line of a run."""
    data = Path(os.environ["QTOOL_DATA"])
    return [
        *(sys.executable, "-m", "qtool", "tune", *run.network, "--strategy", run.strategy, *run.more),
        *("--checkpoint", str(data / "weights" / f"{run.network[1]}.pth"), "--max-drop", "0.5"),
        *("--classes", str(data / "imagenet-classes.txt"), "--calib-data", str(data / "imagenet-sample")),
        *("--calib-samples", "256", "--effective-test-size", str(images / IMAGES), "-o", str(folder)),
        str(data / "imagenet-nips2017"),
    ]


def measure(run: Run, images: int) -> dict[str, object]:
    """What a run ended with."""
    with TemporaryDirectory() as name:
        start = time.perf_counter()
        done = subprocess.run(command(run, images, Path(name)), check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        (folder,) = Path(name).iterdir()
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {"exit_code": done.returncode, "seconds": seconds, "words": done.stdout, **record}


def row(name: str, found: dict[str, object]) -> str:
    """A line of the table."""
    tuning, costs = found["tuning"], found["tuning"]["costs"]
    candidate = tuning["candidate"]
    settings = {k: v for k, v in candidate["settings"].items() if v not in (None, "none", False)}
    raised = [f"{group} {bits or 'float'}" for group, bits in candidate["raised"].items()]
    chosen = ", ".join([*(f"{k} {v}" for k, v in settings.items()), *raised])
    cells = (
        name,
        f"{found['float']['top1']:.1f}",
        f"{found['quantized']['top1']:.1f}",
        f"{tuning['drop']:.2f}",
        "yes" if tuning["met"] else "no",
        f"{100 * tuning['confidence']:.0f} %",
        str(tuning["trials"]),
        f"{found['seconds'] / 60:.1f}",
        f"{100 * costs['size_share']:.1f} %",
        f"{100 * costs['bit_operations_share']:.1f} %",
        str(found["exit_code"]),
        chosen,
    )
    return f"| {' | '.join(cells)} |"


COLUMNS = ("run", "float", "tuned", "drop", "met", "confidence", "trials", "minutes", "weights")
COLUMNS += ("bit operations", "exit", "chosen")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--images", default=IMAGES, show_default=True, help="Evaluation images that choose.")
@click.option("--only", default="", help="Only runs whose name has this in it.")
def main(path: Path, images: int, only: str) -> None:
    """Write the table to PATH, row by row."""
    lines = []
    for run in RUNS:
        if only in run.name:
            lines.append(row(run.name, measure(run, images)))
            write_text(path, text(lines, images))


def text(lines: list[str], images: int) -> str:
    """The file."""
    intro = (__doc__ or "").strip()
    return (
        f"# Tuning to half a point\n\n{intro}\n\nTuned and validated on {images} images; minutes are rough, "
        f"on two shared cores.\n\n{HEAD}\n" + "\n".join(lines) + f"\n\n{NON_COMMERCIAL}\n"
    )


if __name__ == "__main__":
    main()
