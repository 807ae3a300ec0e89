"""The commands that look at statistics files: show, diff and merge."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from qtool.cli.commands import QtoolCommand, pipeline_module, print_text


class Share(click.FloatRange):
    """A number from 0 to 1, and not NaN, which click's own range lets pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is not in the range 0<=x<=1.", param, ctx)
        return number


FILE = click.Path(path_type=Path)
LAYER = click.option(
    "--layer",
    "patterns",
    metavar="PATTERN",
    multiple=True,
    help="Only these layers: names or patterns, repeated or separated by commas.",
)


@click.group()
def stats() -> None:
    """Look at files of statistics, compare them, and merge them."""


@stats.command(cls=QtoolCommand)
@click.argument("file", type=FILE)
@LAYER
@click.option("--inputs", is_flag=True, help="List inputs too that are another layer's output.")
@click.option(
    "--linear", is_flag=True, help="Make bars as high as their counts, rather than the counts' logarithms."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "yaml"]),
    default="table",
    show_default=True,
    help="A table with histograms for people, or all digits without them for programs.",
)
def show(file: Path, patterns: tuple[str, ...], **how: Any) -> None:
    """Show what calibration measured: a line of numbers and a small histogram for each tensor.

    \b
    Example:
        qtool stats show logs/RUN/acts_quantization_stats.yaml --layer 'layer1.*'
    """
    module = pipeline_module("stats_show")
    view = module.View(**how, width=shutil.get_terminal_size((100, 24)).columns, bars=_bars(module))
    print_text(module.show(file, patterns, view))


def _bars(module: Any) -> str:
    """Block characters, or plain ones where stdout's encoding has none."""
    try:
        module.BLOCKS.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return str(module.ASCII)
    return str(module.BLOCKS)


@stats.command(cls=QtoolCommand)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@LAYER
@click.option(
    "--tolerance",
    type=Share(0, 1),
    default=0.0,
    show_default=True,
    help="Largest difference of a number that counts as none, as a share of the tensor's range. With 0, "
    "histograms and numbers of elements must be equal too.",
)
@click.option(
    "--top",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="How many tensors to list, worst first.",
)
def diff(a: Path, b: Path, **how: Any) -> None:
    """Tell where two files differ and by how much; the exit code is 0 if they are equal, 1 if they differ.

    \b
    Example:
        qtool stats diff one.yaml other.yaml --tolerance 0.01
    """
    text, equal = pipeline_module("stats_diff").diff(a, b, **how)
    print_text(text)
    if not equal:
        raise SystemExit(1)


@stats.command(cls=QtoolCommand)
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="File to write; its histograms lie beside it.")
@click.option(
    "--as-is", is_flag=True, help="Merge though weights differ, or images were preprocessed in another way."
)
@click.option("--force", is_flag=True, help="Replace the output if it is there; inputs are never replaced.")
def merge(files: tuple[Path, ...], **how: Any) -> None:
    """Merge calibrations of one network, made on different machines or images, as if they had been one.

    \b
    Example:
        qtool stats merge one.yaml other.yaml -o both.yaml
    """
    if len(files) < 2:
        raise click.UsageError("one file has nothing to be merged with; give two or more.")
    print_text(pipeline_module("stats_merge").merge_files(files, **how))
