"""What calibration costs, against the plain float network over the same batches.

    python benchmarks/calibration.py benchmarks/calibration.md

Two threads, images of noise in memory (data loading is outside), batches of 32. Each round runs the
plain eager float network, then its calibration without counting histograms and with them, and in some
rounds a plain implementation with forward hooks and two passes (range, averages and mean; then std and
b) on the same network. A ratio is the median of those of the rounds, with their quartiles. Freed memory
is kept for all of them (glibc's settings in the environment). b is computed of a sample; its error is
against b of all elements. Peak memory is that of a process that calibrates on so many images, which it
makes batch by batch. The estimators search all tensors of resnet50 from histograms; the files are those
of resnet152.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import qtool
from qtool.numerics.clipping import choose_range
from qtool.numerics.spec import ClipSpec, QuantSpec
from qtool.observers.files import read_stats
from qtool.observers.stats import records
from qtool.observers.tensor import RunningHistogram
from qtool.pipeline.stats_files import save_stats
from qtool.run_dir import write_text

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
SAMPLED = ("resnet18", "mobilenet_v2")
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "MALLOC_ARENA_MAX": "1",
}
IMAGES, BATCH, ROUNDS, THREADS = 256, 32, 9, 2
# It takes so long that only some of the rounds run it.
HOOKS_EVERY = 4
SIDE = 224


def noise(images: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches of noise, made as they are asked for."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, images, BATCH):
        yield torch.randn(min(BATCH, images - start), 3, SIDE, SIDE, generator=generator)


class TwoPasses:
    """Forward hooks on every leaf module, as calibration is commonly written."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, Any] = {}
        self.off: dict[str, Any] = {}

    def run(self, batches: list[Tensor]) -> None:
        """Both passes."""
        for hook in (self._first, self._second):
            leaves = [(n, m) for n, m in self.model.named_modules() if not list(m.children())]
            handles = [m.register_forward_hook(hook(n)) for n, m in leaves]
            for batch in batches:
                self.model(batch)
            for handle in handles:
                handle.remove()

    def _first(self, name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _a: Any, y: Tensor) -> None:
            rows = y.reshape(len(y), -1)
            found = self.sums.setdefault(name, [0.0, 0, 0.0, 0.0])
            self.sums[name] = [
                found[0] + float(rows.sum(dtype=torch.float64)),
                found[1] + rows.numel(),
                found[2] + float(rows.amin(1).double().sum()),
                found[3] + float(rows.amax(1).double().sum()),
            ]

        return hook

    def _second(self, name: str) -> Callable[..., None]:
        mean = self.sums[name][0] / self.sums[name][1]
        self.off[name] = [0.0, 0.0]

        def hook(_m: nn.Module, _a: Any, y: Tensor) -> None:
            off, sums = y - mean, self.off[name]
            sums[0] += float(off.abs().sum(dtype=torch.float64))
            sums[1] += float(off.square_().sum(dtype=torch.float64))

        return hook

    def b(self) -> dict[str, float]:
        """Mean absolute deviation of each module's output."""
        return {name: off / self.sums[name][1] for name, (off, _) in self.off.items()}


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def histograms_left_out() -> Iterator[None]:
    """Count no values but the first of each tensor, so that b can be computed."""
    count = RunningHistogram._count

    def first(histogram: RunningHistogram) -> None:
        if bool(histogram._counts.any()):
            histogram._waiting.clear()
        else:
            count(histogram)

    with patch.object(RunningHistogram, "_count", first):
        yield


@torch.no_grad()
def speed(arch: str) -> str:
    """A row of the first table."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None).eval()
    batches = list(noise(IMAGES))
    traced = qtool.trace(model, batches[0][:2])
    sides: dict[str, Callable[[], object]] = {
        "eager": lambda: [model(batch) for batch in batches],
        "fields": lambda: qtool.calibrate(traced, batches),
        "calibrate": lambda: qtool.calibrate(traced, batches),
        "hooks": lambda: TwoPasses(model).run(batches),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, work in sides.items():
            if name == "hooks" and number % HOOKS_EVERY:
                continue
            with histograms_left_out() if name == "fields" else nullcontext():
                taken = seconds(work)
            if number or name == "hooks":  # the first round warms up
                times[name].append(taken)
    # Each round has a ratio of its own: the machine's speed changes from one to the next.
    rounds = zip(times["eager"], times["fields"], times["calibrate"], strict=True)
    ratios = np.array([(fields / eager, calibrate / eager) for eager, fields, calibrate in rounds])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
    cells = [f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in zip(low, middle, high, strict=True)]
    eager = statistics.median(times["eager"])
    hooks = statistics.median(times["hooks"]) / eager
    return f"| {arch} | {1000 * eager / IMAGES:.1f} | {cells[0]} | {cells[1]} | {hooks:.2f} |"


@torch.no_grad()
def sampled(arch: str) -> str:
    """How far b of a sample is from b of all elements, over all outputs."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None).eval()
    batches = list(noise(IMAGES))
    stats = qtool.calibrate(model, batches)
    plain = TwoPasses(model)
    plain.run(batches)
    outputs = {name: layer.output for name, layer in stats.layers.items() if layer.output is not None}
    off = sorted(abs(outputs[n].b / b - 1) for n, b in plain.b().items() if n in outputs and b > 0)
    return f"| {arch} | {len(off)} | {100 * off[-1]:.2f} | {100 * off[len(off) // 2]:.2f} |"


def memory(arch: str, images: int) -> str:
    """Peak memory of a process that calibrates, MB."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    qtool.calibrate(getattr(torchvision.models, arch)(weights=None).eval(), noise(images))
    return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def searches() -> str:
    """Seconds that the estimators take for all tensors of resnet50."""
    torch.manual_seed(0)
    stats = qtool.calibrate(torchvision.models.resnet50(weights=None).eval(), noise(BATCH))
    found = list({id(record): record for _, record in records(stats)}.values())
    rows = []
    for mode in ("kl", "mse", "percentile"):
        spec = QuantSpec.from_mode("asym_u", 8)
        clip = ClipSpec(mode)
        taken = seconds(lambda s=spec, c=clip: [choose_range(record, s, c) for record in found])
        rows.append(f"| {mode} | {len(found)} | {taken:.2f} |")
    return "\n".join(rows)


def files() -> str:
    """Seconds to write and to read the statistics of resnet152."""
    torch.manual_seed(0)
    stats = qtool.calibrate(torchvision.models.resnet152(weights=None).eval(), [next(noise(2))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "acts_quantization_stats.yaml")
        written = seconds(lambda: save_stats(stats, path))
        text = path.stat().st_size + path.with_name("acts_histograms.npz").stat().st_size
        taken = seconds(lambda: read_stats(path))
    return f"| {len(stats.layers)} | {text / 1e6:.1f} | {written:.2f} | {taken:.2f} |"


PARTS = {"speed": speed, "sampled": sampled, "memory": memory, "searches": searches, "files": files}


def measured(part: str, *arguments: object) -> str:
    """What one part prints, in a process of its own that keeps freed memory."""
    command = [sys.executable, __file__, "-", "--part", part, *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **KEEP_MEMORY}, stdout=subprocess.PIPE, text=True, check=True
    )
    click.echo(done.stdout.strip(), err=True)
    return done.stdout.strip()


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1)
@click.option("--part", type=click.Choice(list(PARTS)), help="Print this part alone.")
def main(result: Path, arguments: tuple[str, ...], part: str | None) -> None:
    """Write the tables to RESULT."""
    if part is not None:
        click.echo(PARTS[part](*(int(a) if a.isdigit() else a for a in arguments)))  # type: ignore[operator]
        return
    lines = ["# Calibration", "", *(line.strip() for line in (__doc__ or "").strip().splitlines()), ""]
    lines += [f"torch {torch.__version__}, {THREADS} threads, {IMAGES} images, {ROUNDS} rounds.", ""]
    lines += [
        "| network | eager float, ms an image | Distiller's fields | with histograms | hooks, two passes |"
    ]
    lines += ["|---|---|---|---|---|"]
    lines += [measured("speed", arch) for arch in MODELS]
    lines += ["", "Ratios to the eager float network.", ""]
    lines += ["| network | outputs | b, largest error, % | median, % |", "|---|---|---|---|"]
    lines += [measured("sampled", arch) for arch in SAMPLED]
    lines += ["", "| network | 64 images, MB | 1,024 images, MB |"]
    lines += ["|---|---|---|"]
    for arch in MODELS:
        few, many = measured("memory", arch, 64), measured("memory", arch, 1024)
        lines.append(f"| {arch} | {few} | {many} |")
    lines += ["", "| estimator | tensors of resnet50 | seconds |", "|---|---|---|", measured("searches")]
    lines += ["", "| layers of resnet152 | MB, both files | write, s | read, s |", "|---|---|---|---|"]
    lines.append(measured("files"))
    write_text(result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
