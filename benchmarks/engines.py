"""What evaluation costs: the simulation, the int8 engine and the converted network against the float network.

    QTOOL_DATA=path/to/data python benchmarks/engines.py benchmarks/engines.md
    python benchmarks/engines.py benchmarks/engines.md --only 'speed/resnet18/*' --only 'images/*/8'

Speed: random weights and noise of 224 x 224 in memory; asym_u activations, symmetric weights per channel,
sums rounded once as by qtool's presets and by torch FX, calibrated on two images. Each round runs every
network once, one after the other; a time is the least of all rounds, a ratio is to the plain eager float
network in the same process. `native` is the file of --qe-convert-pytorch as torch.jit.load reads it, `torch
FX` torch's own int8 network of the same engine (x86), by torch.ao.quantization.quantize_fx. Networks share
a process that keeps freed memory, as the command line does; beside them stands the same with glibc's default.

Real images: trained weights, calibrated on 256 images of imagenet-sample, evaluated on the first images of
imagenet-nips2017 by the simulation, the int8 engine and the converted network.

What has been measured lies beside RESULT in a JSON file, a row for each name; it is not measured again.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import click
import torch
import torchvision
from torch import Tensor, nn

import qtool
from qtool.deploy.engine import INT8, choose_engine
from qtool.deploy.native import convert
from qtool.deploy.native.files import from_file, to_file
from qtool.deploy.parity import parity
from qtool.run_dir import write_text

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1")
BITS = (8, 6, 4)
BATCHES = (32, 1)
THREADS = (1, 2)
MEMORY = ("keep", "default")
SIDE = 224
FX = "torch FX W8A8"
COLUMNS = [f"{form} W{bits}A{bits}" for form in ("simulate", "int8", "native") for bits in BITS] + [FX]
COMPARED = 16

Rows = dict[str, Any]


def quantized(traced: torch.fx.GraphModule, stats: Any, bits: int) -> Any:
    """A network as this benchmark quantizes it."""
    config = qtool.QuantizeConfig(
        mode="asym_u",
        mode_weights="sym",
        per_channel_weights=True,
        bits_weights=bits,
        bits_activations=bits,
        add_rounding="sum",
    )
    return qtool.quantize(traced, stats, config)


def networks(arch: str) -> dict[str, nn.Module]:
    """The float network, and every quantized one in every form, by column."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch, weights=None).eval()
    noise = torch.randn(2, 3, SIDE, SIDE)
    traced = qtool.trace(net, noise)
    stats = qtool.calibrate(traced, [noise])
    found: dict[str, nn.Module] = {"float": net}
    for bits in BITS:
        model = quantized(traced, stats, bits)
        found[f"simulate W{bits}A{bits}"] = model
        found[f"int8 W{bits}A{bits}"] = qtool.evaluator(model, INT8)
        found[f"native W{bits}A{bits}"] = as_file(model, noise)
    found[FX] = fx_quantized(net, noise)
    return found


def as_file(model: Any, noise: Tensor) -> nn.Module:
    """What a user loads who was given the converted network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "native_int8.pt"
        path.write_bytes(to_file(convert(model), noise))
        return from_file(path)


def fx_quantized(net: nn.Module, noise: Tensor) -> nn.Module:
    """torch's own int8 network of the engine x86, its default settings."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "x86"
        prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (noise,))
        prepared(noise)
        converted: nn.Module = convert_fx(prepared)
        return converted


@torch.no_grad()
def speed(found: dict[str, nn.Module], batch: int, threads: int, rounds: int) -> dict[str, float]:
    """The least seconds for a batch of each network, after one round to warm up."""
    torch.set_num_threads(threads)
    x = torch.randn(batch, 3, SIDE, SIDE)
    least = dict.fromkeys(found, float("inf"))
    for number in range(rounds + 1):
        for name, network in found.items():
            start = time.perf_counter()
            network(x)
            taken = time.perf_counter() - start
            least[name] = min(least[name], taken) if number else least[name]
    return least


def measure_speed(names: list[str], rounds: int) -> None:
    """Rows of one network and one way to treat memory, in this process; each is printed when it is there."""
    _, arch, _, _, memory = names[0].split("/")
    if memory == "keep":
        qtool.keep_freed_memory()
    found = networks(arch)
    for name in names:
        batch, threads = (int(part.lstrip("bt")) for part in name.split("/")[2:4])
        click.echo(json.dumps({name: speed(found, batch, threads, rounds)}))


@torch.no_grad()
def measure_images(names: list[str], count: int) -> None:
    """Rows of one network on real images, in this process."""
    from benchmarks import networks as pretrained

    qtool.keep_freed_memory()
    subject = pretrained.load(names[0].split("/")[1])
    stats = qtool.calibrate(subject.traced, subject.calibration)
    batches = torch.cat(subject.images)[:count].split(pretrained.BATCH)
    labels = subject.labels[:count]
    for name in names:
        model = quantized(subject.traced, stats, int(name.split("/")[2]))
        native = choose_engine(model, INT8).native
        assert native is not None
        forms = {"simulate": model, "int8": native, "native": convert(model)}
        logits = {form: torch.cat([network(x) for x in batches]) for form, network in forms.items()}
        predicted = {form: values.argmax(1) for form, values in logits.items()}
        layers = parity(model, native, batches[0][:COMPARED])
        row = {
            "images": len(labels),
            "top1": {form: 100 * float((p == labels).double().mean()) for form, p in predicted.items()},
            "differ": {form: int((p != predicted["simulate"]).sum()) for form, p in predicted.items()},
            "first": next((n for n, layer in layers.items() if layer.in_network.largest), None),
            "least_equal": min(layer.in_network.equal for layer in layers.values()),
            "layers": {n: layer.in_network.equal for n, layer in layers.items()},
        }
        click.echo(json.dumps({name: row}))


def all_names(archs: tuple[str, ...]) -> list[str]:
    """Every row, those that share a process behind one another."""
    speeds = [
        f"speed/{arch}/b{batch}/t{threads}/{memory}"
        for arch in archs
        for memory in MEMORY
        for batch in BATCHES
        for threads in THREADS
    ]
    return speeds + [f"images/{arch}/{bits}" for arch in archs for bits in BITS]


def together(name: str) -> tuple[str, str, str]:
    """What the rows of one process have in common."""
    part = name.split("/")
    return part[0], part[1], part[-1] if part[0] == "speed" else ""


def run(names: list[str], **settings: int) -> Rows:
    """Measure some rows in a process of their own."""
    command = [sys.executable, __file__, "-", "--job", json.dumps({"names": names, **settings})]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise click.ClickException(f"{names[0]}: {done.stderr.strip()[-800:]}")
    rows: Rows = {}
    for line in done.stdout.splitlines():
        rows |= json.loads(line) if line.startswith("{") else {}
    return rows


def speed_tables(rows: Rows) -> list[str]:
    """A table for each batch size and number of threads."""
    lines = []
    for batch in BATCHES:
        for threads in THREADS:
            found = [n for n in rows if n.startswith("speed/") and f"/b{batch}/t{threads}/" in n]
            if not found:
                continue
            lines += ["", f"## Batch {batch}, {threads} threads", ""]
            lines += [f"| network | float, ms an image | {' | '.join(COLUMNS)} | native / torch FX |"]
            lines += ["|---" * (3 + len(COLUMNS)) + "|"]
            for name in sorted(found, key=lambda n: MEMORY.index(n.rsplit("/", 1)[1])):
                lines.append(speed_line(name, batch, rows[name]))
    return lines


def speed_line(name: str, batch: int, least: dict[str, float]) -> str:
    _, arch, *_, memory = name.split("/")
    ratios = " | ".join(f"{least[column] / least['float']:.3f}" for column in COLUMNS)
    shown = arch if memory == "keep" else f"{arch}, default allocator"
    against = least["native W8A8"] / least[FX]
    return f"| {shown} | {1000 * least['float'] / batch:.2f} | {ratios} | {against:.2f} |"


def image_table(rows: Rows) -> list[str]:
    """The forms on real images."""
    names = [name for name in rows if name.startswith("images/")]
    if not names:
        return []
    lines = [
        "",
        "## Real images",
        "",
        "| network | bits | images | top-1 simulate | int8 | native | predictions that differ: int8 | native "
        f"| first layer that differs (int8, {COMPARED} images) | least equal of a layer, % |",
        "|---" * 10 + "|",
    ]
    for name in names:
        row, (_, arch, bits) = rows[name], name.split("/")
        top1 = " | ".join(f"{row['top1'][form]:.1f}" for form in ("simulate", "int8", "native"))
        differ = " | ".join(str(row["differ"][form]) for form in ("int8", "native"))
        lines.append(
            f"| {arch} | W{bits}A{bits} | {row['images']} | {top1} | {differ} | {row['first'] or 'none'} "
            f"| {100 * row['least_equal']:.3f} |"
        )
    return lines


def text_of(rows: Rows, archs: tuple[str, ...], rounds: int) -> str:
    """The whole result."""
    known = {name: rows[name] for name in all_names(archs) if name in rows}
    doc = [line.strip() for line in (__doc__ or "").strip().splitlines()]
    words = f"torch {torch.__version__}, {rounds} rounds. Ratios to the eager float network; less is faster."
    lines = ["# Evaluation at integer speed", "", *doc, "", words, *speed_tables(known), *image_table(known)]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--networks", "archs", default=",".join(NETWORKS), show_default=True)
@click.option("--only", multiple=True, help="Rows by pattern, such as 'speed/*/b32/t1/keep' or 'images/*/8'.")
@click.option("--rounds", default=5, show_default=True, help="After one to warm up.")
@click.option("--images", type=click.IntRange(1, 1000), default=1000, show_default=True)
@click.option("--again", is_flag=True, help="Measure rows that are there already.")
@click.option("--job", hidden=True)
def main(
    result: Path, archs: str, only: tuple[str, ...], rounds: int, images: int, again: bool, job: str | None
) -> None:
    """Write the tables to RESULT, and what was measured to a JSON file beside it."""
    if job is not None:
        asked = json.loads(job)
        is_speed = asked["names"][0].startswith("speed/")
        measure_speed(asked["names"], asked["rounds"]) if is_speed else measure_images(
            asked["names"], asked["images"]
        )
        return
    store = result.with_suffix(".json")
    rows: Rows = json.loads(store.read_text()) if store.is_file() else {}
    chosen = tuple(archs.split(","))
    wanted = [n for n in all_names(chosen) if not only or any(fnmatch.fnmatch(n, p) for p in only)]
    wanted = [name for name in wanted if again or name not in rows]
    for group in dict.fromkeys(map(together, wanted)):
        names = [name for name in wanted if together(name) == group]
        click.echo(f"measuring {', '.join(names)}", err=True)
        rows |= run(names, rounds=rounds, images=images)
        write_text(store, json.dumps(rows, indent=1) + "\n")
        write_text(result, text_of(rows, chosen, rounds))
    if not wanted:
        write_text(result, text_of(rows, chosen, rounds))


if __name__ == "__main__":
    main()
