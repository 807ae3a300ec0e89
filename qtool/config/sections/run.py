"""Where a run computes and what it writes: the section `run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.config.options import OUTPUT, option

# They answer one question: a flag for one of them wins over all of them in a file.
DEVICE_OPTIONS = ("device", "cpu", "gpus")


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    out_dir: Path = option(
        Path("logs"), OUTPUT, "Folder in which the run's own folder is made.", "-o", "--out-dir"
    )
    name: str | None = option(
        None,
        click.STRING,
        "Name of the run; its folder starts with it.",
        "-n",
        "--name",
        shown_default="none",
    )
    seed: int = option(
        0,
        click.IntRange(0, 2**32 - 1),
        "Chooses the calibration images, and the order of training.",
        "--seed",
    )
    device: str = option("cpu", click.STRING, "Where the network runs: cpu, cuda, cuda:1.", "--device")
    cpu: bool = option(False, click.BOOL, "Run on the CPU, as --device cpu does.", "--cpu")
    gpus: str | None = option(
        None, click.STRING, "Run on the GPU of this number, as --device cuda:N does.", "--gpus", metavar="N"
    )
    det: bool = option(
        False, click.BOOL, "Refuse operations whose result depends on timing (a GPU has some).", "--det"
    )
    release_memory: bool = option(
        False,
        click.BOOL,
        "Give freed memory back to the system at once; keeping it is faster (on Linux with glibc).",
        "--release-memory",
    )
    confusion: bool = option(
        False, click.BOOL, "Write confusion matrices (rows: labels, columns: predictions).", "--confusion"
    )
    skip_float: bool = option(False, click.BOOL, "Do not evaluate the float network.", "--skip-float")
    save_predictions: Path | None = option(
        None,
        OUTPUT,
        "Write path, label and predictions of every image to this .npz file.",
        "--save-predictions",
    )

    @property
    def chosen_device(self) -> str:
        """Where the network runs, by whichever of the three flags says it."""
        return "cpu" if self.cpu else self.device if self.gpus is None else f"cuda:{self.gpus}"
