"""What evaluation costs: the simulation and the int8 engine against the float network.

    python benchmarks/engines.py benchmarks/engines.md
    QTOOL_DATA=path/to/data python benchmarks/engines.py benchmarks/engines.md --images 1000

Random weights and noise of 224 x 224 in memory; asym_u activations, symmetric weights per channel,
calibrated on two images. Each round runs every network once, one after the other; a time is the least of all
rounds, a ratio is to the plain eager float network in the same process. Networks share a process that keeps
freed memory, as the command line does; below them stands the same with glibc's default. With --images, also
networks with trained weights on so many real images: by the simulation and by the int8 engine, through
`qtool quantize` and `qtool evaluate`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import qtool
from qtool.run_dir import write_text

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1")
BITS = (8, 6, 4)
ENGINES = ("simulate", "int8")
SIDE = 224
COLUMNS = [f"{engine} W{bits}A{bits}" for engine in ENGINES for bits in BITS]
HEAD = f"| network | float, ms an image | {' | '.join(COLUMNS)} |"
SEPARATOR = "|---" * (2 + len(COLUMNS)) + "|"
SETTINGS = "--qe-mode asym_u --qe-mode-wts sym --qe-per-channel"


def networks(arch: str, batch: int) -> tuple[Tensor, dict[str, nn.Module]]:
    """A batch, the float network, and every quantized one on every engine, by column."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch, weights=None).eval()
    x = torch.randn(batch, 3, SIDE, SIDE)
    traced = qtool.trace(net, x[:2] if batch > 1 else x.expand(2, -1, -1, -1))
    stats = qtool.calibrate(traced, [torch.randn(2, 3, SIDE, SIDE)])
    found: dict[str, nn.Module] = {"float": net}
    for bits in BITS:
        config = qtool.QuantizeConfig(
            mode="asym_u",
            mode_weights="sym",
            per_channel_weights=True,
            bits_weights=bits,
            bits_activations=bits,
        )
        quantized = qtool.quantize(traced, stats, config)
        found |= {f"{e} W{bits}A{bits}": qtool.evaluator(quantized, e) for e in ENGINES}
    return x, found


@torch.no_grad()
def speed(arch: str, batch: int, rounds: int) -> dict[str, float]:
    """The least seconds for a batch of each network, after one round to warm up."""
    x, found = networks(arch, batch)
    least = dict.fromkeys(found, float("inf"))
    for number in range(rounds + 1):
        for name, network in found.items():
            start = time.perf_counter()
            network(x)
            taken = time.perf_counter() - start
            least[name] = min(least[name], taken) if number else least[name]
    return least


def row(arch: str, batch: int, threads: int, keep: bool, rounds: int) -> str:
    """A line of the table, measured in a process of its own."""
    job = json.dumps({"arch": arch, "batch": batch, "threads": threads, "keep": keep, "rounds": rounds})
    text = _run([sys.executable, __file__, "-", "--job", job], OMP_NUM_THREADS=str(threads))
    least = json.loads(text.splitlines()[-1])
    ratios = " | ".join(f"{least[column] / least['float']:.3f}" for column in COLUMNS)
    name = arch if keep else f"{arch}, default allocator"
    line = f"| {name} | {1000 * least['float'] / batch:.2f} | {ratios} |"
    click.echo(f"batch {batch}, {threads} threads: {line}", err=True)
    return line


def on_images(arch: str, bits: int, images: int, data: Path) -> str:
    """Top-1 of the two engines on real images, calibrated on others, and how their integers differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = (
            f"--classes {data}/imagenet-classes.txt --effective-test-size {images / 1000} -b 32 -j 1 "
            f"-o {folder} {data}/imagenet-nips2017"
        ).split()
        crop = ["--crop", "225"] if arch == "mobilenet_v2" else []
        asked = (
            f"-a {arch} --checkpoint {data}/weights/{arch}.pth --calib-data {data}/imagenet-sample "
            f"--calib-samples 128 {SETTINGS} --qe-bits-wts {bits} --qe-bits-acts {bits} --skip-float "
            f"--engine int8 --verify 16 --save-predictions {folder}/int8.npz -n int8"
        ).split()
        int8 = _results("quantize", *asked, *crop, *common)
        checkpoint = next(folder.glob("*/*quantized_checkpoint.pth.tar"))
        predictions = f"--save-predictions {folder}/simulate.npz -n simulate".split()
        simulate = _results("evaluate", "--checkpoint", str(checkpoint), *predictions, *common)
        with np.load(folder / "int8.npz") as a, np.load(folder / "simulate.npz") as b:
            different = int((a["quantized_prediction"] != b["quantized_prediction"]).sum())
    top1 = [found["quantized"]["top1"] for found in (simulate, int8)]
    count, parity = int8["quantized"]["images"], int8["parity"]
    line = (
        f"| {arch} | W{bits}A{bits} | {count} | {top1[0]:.2f} | {top1[1]:.2f} "
        f"| {round(abs(top1[0] - top1[1]) * count / 100)} | {different} | {parity['first_different_layer']} "
        f"| {parity['largest_difference']} | {100 * parity['least_equal']:.2f} |"
    )
    click.echo(line, err=True)
    return line


def _results(*args: str) -> dict[str, Any]:
    text = _run([sys.executable, "-m", "qtool", *args])
    return json.loads((Path(text.splitlines()[-1]) / "results.json").read_text())  # type: ignore[no-any-return]


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise click.ClickException(done.stderr.strip()[-800:])
    return done.stdout.strip()


def _do(job: dict[str, Any]) -> None:
    if job["keep"]:
        qtool.keep_freed_memory()
    torch.set_num_threads(job["threads"])
    click.echo(json.dumps(speed(job["arch"], job["batch"], job["rounds"])))


def speed_tables(
    archs: tuple[str, ...], batches: tuple[int, ...], threads: tuple[int, ...], rounds: int
) -> list[str]:
    """A table for each batch size and number of threads."""
    lines = []
    for batch in batches:
        for count in threads:
            lines += ["", f"## Batch {batch}, {count} threads", "", HEAD, SEPARATOR]
            for keep in (True, False):
                lines += [row(arch, batch, count, keep, rounds) for arch in archs]
    return lines


def image_table(archs: tuple[str, ...], images: int) -> list[str]:
    """The engines on real images."""
    data = Path(os.environ.get("QTOOL_DATA") or "shared/data").absolute()
    if not data.is_dir():
        raise click.ClickException(f"--images: {data} is no folder; set QTOOL_DATA to that of the test data")
    head = (
        "| network | bits | images | top-1 simulate | top-1 int8 | images apart | predictions that differ "
        "| first layer that differs | largest difference, steps | least equal of a layer, % |"
    )
    lines = ["", "## Real images", "", head, "|---" * 10 + "|"]
    return lines + [on_images(arch, bits, images, data) for arch in archs for bits in BITS]


def several(kind: Callable[[str], Any]) -> Callable[[Any, Any, str], tuple[Any, ...]]:
    """A list separated by commas."""
    return lambda _context, _option, text: tuple(kind(part) for part in text.split(","))


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--networks", "archs", default=",".join(NETWORKS), show_default=True, callback=several(str))
@click.option("--batches", default="32,1", show_default=True, callback=several(int))
@click.option("--threads", default="1,2", show_default=True, callback=several(int))
@click.option("--rounds", default=5, show_default=True, help="After one to warm up.")
@click.option("--images", type=click.IntRange(1, 1000), help="Also run on so many real images.")
@click.option("--only-images", is_flag=True, help="Leave the times out.")
@click.option("--job", help="Print the times of this process alone.")
def main(
    result: Path,
    archs: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    rounds: int,
    images: int | None,
    only_images: bool,
    job: str | None,
) -> None:
    """Write the tables to RESULT; - prints them."""
    if job is not None:
        _do(json.loads(job))
        return
    lines = ["# Evaluation at integer speed", ""]
    lines += [line.strip() for line in (__doc__ or "").strip().splitlines()]
    lines += [
        "",
        f"torch {torch.__version__}, {rounds} rounds. Ratios to the eager float network; less is faster.",
    ]
    lines += [] if only_images else speed_tables(archs, batches, threads, rounds)
    lines += [] if images is None else image_table(archs, images)
    text = "\n".join(lines) + "\n"
    if str(result) == "-":
        click.echo(text)
    else:
        write_text(result, text)


if __name__ == "__main__":
    main()
