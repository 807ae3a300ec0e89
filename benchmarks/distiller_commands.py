"""Run Distiller's published command lines and its ResNet-18 6-bit experiment, as their users have them.

    QTOOL_DATA=path/to/data python benchmarks/distiller_commands.py benchmarks/

Each row is a process: `qtool quantize` (float: `qtool evaluate`) and the arguments that followed the
script's name in Distiller's guide, with its own statistics files; only the weights and images are those
of the test data. Rows that distiller_commands.json holds already are not run again;
distiller_commands.md is written from it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from qtool.run_dir import write_text

COMMON = (
    "-a {arch} -p 10 -j 2 --checkpoint $QTOOL_DATA/weights/{arch}.pth "
    "--classes $QTOOL_DATA/imagenet-classes.txt $QTOOL_DATA/imagenet-nips2017 --evaluate"
)
STATS = "--qe-stats-file $QTOOL_DATA/distiller/{arch}_quant_stats.yaml"
BEST = "--qe-per-channel --qe-clip-acts avg --qe-no-clip-layers fc"
SIX = "--qe-bits-acts 6 --qe-bits-wts 6"
ROWS = {
    "float": "",
    "sym": f"--quantize-eval {STATS}",
    "sym per-channel": f"--quantize-eval --qe-per-channel {STATS}",
    "sym per-channel avg": f"--quantize-eval --qe-per-channel --qe-clip-acts avg {STATS}",
    "sym per-channel avg except fc": f"--quantize-eval {BEST} {STATS}",
    "asym_u": f"--quantize-eval --qe-mode asym_u {STATS}",
    "asym_u per-channel avg except fc": f"--quantize-eval --qe-mode asym_u {BEST} {STATS}",
    "sym 6-bit": f"--quantize-eval {SIX} {STATS}",
    "asym_u 6-bit": f"--quantize-eval --qe-mode asym_u {SIX} {STATS}",
    "asym_u per-channel avg except fc 6-bit": f"--quantize-eval --qe-mode asym_u {SIX} {BEST} {STATS}",
}
PUBLISHED = {
    "resnet50": [76.130, 74.904, 75.154, 72.268, 75.824, 75.292, 75.986, 36.124, 62.230, 74.494],
    "6 bits": [62.776, 67.748, 67.928, 68.872, 68.976],
}
SIX_BITS = "resnet18_imagenet_post_train.yaml"
SIX_BITS_FLOAT = 69.758
SIX_BITS_RUNS = {
    "run 2": "6 bits everywhere, fc clipped",
    "run 3": "fc not clipped",
    "run 4": "and adds 8 bits",
    "run 5": "first and last layer 8 bits, fc not clipped",
    "run 6": "and adds 8 bits",
}
HEAD = """# Distiller's command lines and its 6-bit experiment, on today's PyTorch

Command: `QTOOL_DATA=... python benchmarks/distiller_commands.py benchmarks/`

The arguments that follow the script's name in Distiller's guide, behind `qtool quantize`, with
Distiller's own statistics files; evaluated on all 1,000 images of imagenet-nips2017. The statistics
were measured by Distiller's authors on other weights of the same networks, which costs accuracy in some
rows (with statistics of these weights: seed_table.md). The resnet18 and resnet50 weights are from github
uber-research/permute-quantize-finetune, under the Uber Non-Commercial License; these tables are for
non-commercial use only.

Each line is `-a ARCH -p 10 -j 2 --checkpoint $QTOOL_DATA/weights/ARCH.pth --classes
$QTOOL_DATA/imagenet-classes.txt $QTOOL_DATA/imagenet-nips2017 --evaluate`, what the table shows, and
`--qe-stats-file $QTOOL_DATA/distiller/ARCH_quant_stats.yaml`. Differences are paired over the images, with
their standard error. Published figures are on ImageNet's validation set, with torchvision's weights.
"""


def run(arguments: str, folder: Path) -> dict[str, Any]:
    """Run one command line; what its results.json holds."""
    words = [os.path.expandvars(word) for word in shlex.split(arguments)]
    command = "quantize" if "--quantize-eval" in words else "evaluate"
    if command == "evaluate":
        words.remove("--evaluate")
    done = subprocess.run(["qtool", command, *words, "-o", folder], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: qtool {command} {arguments}")
    record: dict[str, Any] = json.loads((Path(done.stdout.splitlines()[-1]) / "results.json").read_text())
    return {name: value for name, value in record.items() if name not in ("model", "calibration", "seed")}


def variant(text: str, number: str) -> str:
    """Distiller's YAML with the override section of one run uncommented."""
    if number == "run 2":
        return text
    before, section = text.split(f"    # Overrides section for {number}\n", 1)
    lines = section.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return before + re.sub(r"(?m)^#", "", "".join(lines[:end])) + "".join(lines[end:])


def own_stats(folder: Path) -> Path:
    """Statistics of these weights, on 256 images of imagenet-sample."""
    data = Path(os.environ["QTOOL_DATA"])
    command = [
        "qtool",
        "calibrate",
        "-a",
        "resnet18",
        "--checkpoint",
        data / "weights/resnet18.pth",
        "-j",
        "2",
    ]
    command += ["--calib-data", data / "imagenet-sample", "--calib-samples", "256", "-o", folder / "logs"]
    command += ["--classes", data / "imagenet-classes.txt", data / "imagenet-nips2017"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.splitlines()[-1])


def measure(known: dict[str, Any], out: Path) -> None:
    """Run what is not known yet; out is rewritten after each row."""
    data = Path(os.environ["QTOOL_DATA"]) / "distiller"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jobs = [
            (arch, name, f"{COMMON} {flags}".format(arch=arch))
            for arch in ("resnet18", "resnet50")
            for name, flags in ROWS.items()
        ]
        for table, stats in (("6 bits", data / "resnet18_quant_stats.yaml"), ("6 bits, own", None)):
            if all(number in known.get(table, {}) for number in SIX_BITS_RUNS):
                continue
            place = folder / table.replace(" ", "")
            place.mkdir()
            # The YAML names a path in Distiller's source tree; its mere name is found beside the file.
            (place / "resnet18_quant_stats.yaml").write_bytes((stats or own_stats(folder)).read_bytes())
            for number in SIX_BITS_RUNS:
                path = place / f"{number.replace(' ', '')}.yaml"
                path.write_text(variant((data / SIX_BITS).read_text(), number))
                flags = f"{COMMON} --quantize-eval --qe-config-file {path}"
                jobs.append((table, number, flags.format(arch="resnet18")))
        for table, name, arguments in jobs:
            rows = known.setdefault(table, {})
            if name not in rows:
                rows[name] = run(arguments, folder / "logs")
                write_text(out, json.dumps(known, indent=1) + "\n")


def line(record: dict[str, Any], published: float | None, published_float: float, cells: list[str]) -> str:
    """One row of a table."""
    if "quantized" in record:
        cells = [
            *cells,
            f"{record['quantized']['top1']:.2f}",
            f"{record['top1_difference']:+.2f} ± {record['top1_standard_error']:.2f}",
            f"{record['agreement']:.1f}",
            f"{record['logit_sqnr_db']:.1f}",
        ]
    else:
        cells = [*cells, f"{record['float']['top1']:.2f}", "", "", ""]
    if published is not None:
        cells += [f"{published:.2f}", f"{published - published_float:+.2f}"]
    return "| " + " | ".join(cells) + " |"


def report(known: dict[str, Any]) -> str:
    """The tables as markdown."""
    columns = "top-1 | difference ± s.e. | agreement % | logit SQNR dB |"
    published = " published | published difference |"
    lines = [HEAD]
    for arch in ("resnet50", "resnet18"):
        figures = PUBLISHED.get(arch, [None] * len(ROWS))
        lines += [f"## {arch}", "", f"| arguments | {columns}" + (published if figures[0] else "")]
        lines += ["|---|---|---|---|---|" + ("---|---|" if figures[0] else "")]
        for (name, flags), figure in zip(ROWS.items(), figures, strict=True):
            if name in known.get(arch, {}):
                text = flags.replace(STATS, "").strip() or "(float)"
                lines.append(line(known[arch][name], figure, PUBLISHED["resnet50"][0], [f"`{text}`"]))
        lines.append("")
    lines += [
        f"## {SIX_BITS}, runs 2 to 6 of its header",
        "",
        "Each run is the file with its section uncommented, behind `--quantize-eval --qe-config-file`; with",
        "Distiller's statistics, and with those of these weights (256 images of imagenet-sample) instead.",
    ]
    titles = {"6 bits": "Distiller's statistics", "6 bits, own": "Statistics of these weights"}
    for table, title in titles.items():
        lines += ["", f"### {title}", "", f"| run | overrides | {columns}{published}", "|---" * 8 + "|"]
        for (number, text), figure in zip(SIX_BITS_RUNS.items(), PUBLISHED["6 bits"], strict=True):
            if number in known.get(table, {}):
                lines.append(line(known[table][number], figure, SIX_BITS_FLOAT, [number, text]))
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Run what is missing in FOLDER/distiller_commands.json, and write FOLDER/distiller_commands.md."""
    if not Path(os.environ.setdefault("QTOOL_DATA", "../shared/data")).is_dir():
        sys.exit(f"{os.environ['QTOOL_DATA']}: no such folder; set QTOOL_DATA to the folder of test data")
    out = folder / "distiller_commands.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    measure(known, out)
    write_text(folder / "distiller_commands.md", report(known))


if __name__ == "__main__":
    main()
