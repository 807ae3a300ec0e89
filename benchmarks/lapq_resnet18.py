"""LAPQ on resnet18 with Distiller's own file for it: left alone, and killed and resumed.

    QTOOL_DATA=path/to/data python benchmarks/lapq_resnet18.py benchmarks/lapq_resnet18.md --runs runs/

Each run is a process of `qtool quantize`, with the arguments that the table names. One is left alone; one
is ended by SIGKILL in the middle of its search, and another takes over from it. A run that has ended well
in the folder of runs is not made again.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qtool.run_dir import write_text

LOSS_IMAGES = 64
KILLED_AFTER = 400  # results in the journal: 363 of p-norms, 11 of starts, and a part of the search
PLAIN = (
    "-a resnet18 --checkpoint $QTOOL_DATA/weights/resnet18.pth "
    "--qe-config-file $QTOOL_DATA/distiller/resnet18_imagenet_post_train_lapq.yaml "
    "--classes $QTOOL_DATA/imagenet-classes.txt $QTOOL_DATA/imagenet-nips2017 -b 32 -j 1 -p 20"
)
LAPQ = (
    f"{PLAIN} --skip-float --qe-lapq --lapq-maxiter 1 "
    f"--calib-data $QTOOL_DATA/imagenet-sample --calib-samples {LOSS_IMAGES}"
)
# With glibc, memory that was freed stays with the process, which is much faster.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
JOURNAL = "search_journal.jsonl"
ENDS = ("quant_params_dict.yaml", "layer_quant_params.yaml", JOURNAL)
HEAD = """# LAPQ on resnet18, with Distiller's file

Command: `QTOOL_DATA=... python benchmarks/lapq_resnet18.py benchmarks/lapq_resnet18.md --runs runs/`

`resnet18_imagenet_post_train_lapq.yaml` as it is: 4-bit weights of the convolutions, per tensor, and 4-bit
outputs of the ReLUs; the first convolution with its ReLU, the last one, additions, pooling and fc stay in
float. Ranges of activations start from Distiller's own `resnet18_quant_stats.yaml`, which the file names.

The resnet18 weights are from github uber-research/permute-quantize-finetune, under the Uber Non-Commercial
License; this table is for non-commercial use only.
"""


@dataclass(frozen=True)
class Run:
    """A run that has ended well: its folder, results, and cost."""

    folder: Path
    results: dict[str, Any]
    seconds: float
    cpu_seconds: float


def start(arguments: str, out_dir: Path, threads: int) -> "subprocess.Popen[bytes]":
    """A process of `qtool quantize`."""
    command = [sys.executable, "-m", "qtool", "quantize", *shlex.split(os.path.expandvars(arguments))]
    environment = {**os.environ, **KEEP_FREED_MEMORY, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([*command, "-o", str(out_dir)], env=environment)


def ended(out_dir: Path) -> Run | None:
    """The run in a folder, if it has ended well."""
    for path in out_dir.glob("*/results.json"):
        cost = json.loads((out_dir / "cost.json").read_text())
        return Run(path.parent, json.loads(path.read_text()), **cost)
    return None


def run(arguments: str, out_dir: Path, threads: int) -> Run:
    """Make a run, unless it has ended well before."""
    found = ended(out_dir)
    if found is not None:
        return found
    before = time.perf_counter()
    process = start(arguments, out_dir, threads)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{out_dir}: the run has failed, see above")
    seconds = {"seconds": time.perf_counter() - before, "cpu_seconds": usage.ru_utime + usage.ru_stime}
    write_text(out_dir / "cost.json", json.dumps(seconds) + "\n")
    found = ended(out_dir)
    assert found is not None
    return found


def run_until(arguments: str, out_dir: Path, entries: int, threads: int) -> Path:
    """Kill a run when its journal has so many entries; its folder."""
    for journal in out_dir.glob(f"*/{JOURNAL}"):
        return journal.parent
    process = start(arguments, out_dir, threads)
    while process.poll() is None:
        for journal in out_dir.glob(f"*/{JOURNAL}"):
            if journal.read_bytes().count(b"\n") > entries:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return journal.parent
        time.sleep(0.2)
    sys.exit(f"{out_dir}: ended before its journal had {entries} entries")


def same_end(a: Run, b: Run) -> str:
    """Which files are equal byte for byte, and whether the results are, in words."""
    different = [name for name in ENDS if (a.folder / name).read_bytes() != (b.folder / name).read_bytes()]
    keys = ("loss", "top1", "top5")
    numbers = [[r.results["quantized"][key] for key in keys] for r in (a, b)]
    if different or numbers[0] != numbers[1]:
        return f"**not the same**: {', '.join(different) or 'the evaluation'}"
    return f"the same bytes in {', '.join(f'`{name}`' for name in ENDS)}, and the same evaluation"


def row(name: str, evaluated: dict[str, Any], searched: dict[str, Any] | None = None) -> str:
    """A line of the table."""
    cells = ["", ""] if searched is None else [f"{searched['loss']:.4f}", f"{searched['top1']:.2f}"]
    on_evaluation = [f"{evaluated['top1']:.2f}", f"{evaluated['top5']:.2f}", f"{evaluated['loss']:.4f}"]
    return f"| {name} | {' | '.join([*on_evaluation, *cells])} |"


def report(plain: Run, whole: Run, killed: Path, resumed: Run, threads: int) -> str:
    """The page."""
    found, images = whole.results["lapq"], whole.results["evaluation"]
    searched = found["images"]
    initial, final = found["initial"], found["final"]
    better = whole.results["quantized"]["top1"] - initial["evaluation"]["top1"]
    again = resumed.results["lapq"]
    entries = (killed / JOURNAL).read_bytes().count(b"\n") - 1
    lines = [
        HEAD,
        f"Evaluated on all {images['images']} images of {images['dataset']}; the search evaluates on "
        f"{searched['images']} images of {searched['dataset']}, {searched['overlap']} of them among these.",
        "",
        "| resnet18, W4A4 | top-1 | top-5 | loss | loss of the search | top-1 of the search |",
        "|---|---|---|---|---|---|",
        row("float", plain.results["float"]),
        row("4 bits, ranges from statistics", plain.results["quantized"]),
        row(f"LAPQ's start, p = {found['p']:.2f}", initial["evaluation"], initial),
        row("LAPQ, one iteration of Powell", whole.results["quantized"], final),
        "",
        f"The end is {better:+.2f} points of top-1 above the start. {found['ranges']} ranges, "
        f"{found['evaluations']} evaluations of the loss, {found['seconds']:.0f} s for start and search; the "
        f"whole run, with two evaluations of {images['images']} images, took {whole.seconds:.0f} s and "
        f"{whole.cpu_seconds:.0f} s of CPU time, {threads} thread(s) on a machine of two cores that other "
        "work kept busy.",
        "",
        f"Killed by SIGKILL with {entries} results in its journal, and resumed: {same_end(whole, resumed)}. "
        f"The resumed run took {again['resumed']} results over, and {resumed.seconds:.0f} s "
        f"({resumed.cpu_seconds:.0f} s of CPU time).",
        "",
        "Arguments behind `qtool quantize`, without and with LAPQ; the killed run is resumed with "
        "`--resume-search-from` its folder:",
        "",
        f"    {PLAIN}",
        "",
        f"    {LAPQ}",
    ]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("result", type=click.Path(path_type=Path))
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("logs/lapq_resnet18"), show_default=True
)
@click.option("--threads", default=2, show_default=True)
def main(result: Path, runs: Path, threads: int) -> None:
    """Make the runs that are missing, and write RESULT."""
    if not Path(os.environ.get("QTOOL_DATA", "")).is_absolute():
        sys.exit("set QTOOL_DATA to the absolute path of the folder of test data")
    whole = run(LAPQ, runs / "whole", threads)
    killed = run_until(LAPQ, runs / "killed", KILLED_AFTER, threads)
    resumed = run(f"{LAPQ} --resume-search-from {killed}", runs / "resumed", threads)
    plain = run(PLAIN, runs / "plain", threads)
    write_text(result, report(plain, whole, killed, resumed, threads))


if __name__ == "__main__":
    main()
