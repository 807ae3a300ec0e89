"""Measure the ten rows of Distiller's published table, and a table of six networks.

    QTOOL_DATA=path/to/data python scripts/seed_table.py benchmarks/

Calibrates on 256 images of one set (ImageNet: imagenet-sample; CIFAR: train npz), evaluates on
all images of the other (imagenet-nips2017; test npz), and writes seed_table.md and seed_table.json
into the given folder. A row that the json holds already is not measured again.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import qtool
from qtool.config import Config, QuantizeConfig, load_config
from qtool.pipeline import inputs
from qtool.report import compare
from qtool.run_dir import write_text

CALIBRATION_IMAGES = 256
NON_COMMERCIAL = (
    "The resnet18 and resnet50 weights are from github uber-research/permute-quantize-finetune, under the "
    "Uber Non-Commercial License; these rows are for non-commercial use only."
)


@dataclass(frozen=True)
class Row:
    """One configuration, and Distiller's published ResNet-50 top-1 for it (ImageNet validation set)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    published: float | None = None


AVG_EXCEPT_FC = {"clip_activations": "avg", "no_clip_layers": ("fc",)}
SIX = {"bits_activations": 6, "bits_weights": 6}
SEED_ROWS = [
    Row("sym", {}, 74.904),
    Row("sym per-channel", {"per_channel_weights": True}, 75.154),
    Row("sym per-channel avg", {"per_channel_weights": True, "clip_activations": "avg"}, 72.268),
    Row("sym per-channel avg except fc", {"per_channel_weights": True, **AVG_EXCEPT_FC}, 75.824),
    Row("asym_u", {"mode": "asym_u"}, 75.292),
    Row(
        "asym_u per-channel avg except fc",
        {"mode": "asym_u", "per_channel_weights": True, **AVG_EXCEPT_FC},
        75.986,
    ),
    Row("sym 6-bit", SIX, 36.124),
    Row("asym_u 6-bit", {"mode": "asym_u", **SIX}, 62.230),
    Row(
        "asym_u per-channel avg except fc 6-bit",
        {"mode": "asym_u", "per_channel_weights": True, **AVG_EXCEPT_FC, **SIX},
        74.494,
    ),
]
PUBLISHED_FLOAT = 76.130
NETWORK_ROWS = [
    Row("sym", {}),
    Row("asym_u per-channel", {"mode": "asym_u", "per_channel_weights": True}),
]


@dataclass(frozen=True)
class Network:
    """A network of the shared data, and its own preprocessing where it differs."""

    arch: str
    weights: str
    rows: list[Row]
    crop: int | None = None
    cifar: bool = False


NETWORKS = [
    Network("resnet18", "weights/resnet18.pth", SEED_ROWS + NETWORK_ROWS[1:]),
    Network("mobilenet_v2", "weights/mobilenet_v2.pth", NETWORK_ROWS, crop=225),
    Network("squeezenet1_1", "weights/squeezenet1_1.pth", NETWORK_ROWS),
    Network("resnet20", "cifar10/resnet20.pth", NETWORK_ROWS, cifar=True),
    Network("resnet20_cifar", "cifar10/resnet20_distiller.pth", NETWORK_ROWS, cifar=True),
    Network("resnet50", "weights/resnet50.pth", SEED_ROWS + NETWORK_ROWS[1:]),
]


def config_for(network: Network, data: Path) -> Config:
    """The configuration of the float network and both image sets."""
    common = {
        "arch": network.arch,
        "checkpoint": data / network.weights,
        "calib_samples": CALIBRATION_IMAGES,
        "batch_size": 50,
    }
    if network.cifar:
        sets = {"path": data / "cifar10/test-1017.npz", "calib_data": data / "cifar10/train-5085.npz"}
        return load_config(None, **common, **sets)
    return load_config(
        None,
        **common,
        path=data / "imagenet-nips2017",
        classes=data / "imagenet-classes.txt",
        calib_data=data / "imagenet-sample",
        crop=network.crop,
    )


def measure(network: Network, data: Path, known: dict[str, Any], out: Path) -> None:
    """Measure the rows of a network that are not known yet; out is rewritten after each."""
    if all(row.name in known.get(network.arch, {}) for row in network.rows):
        return
    config = config_for(network, data)
    subject = inputs.open_subject(config)
    evaluation = inputs.open_evaluation(config, subject)
    batches = list(evaluation.loader(config))
    calibration = inputs.open_calibration(config, subject, evaluation)
    assert inputs.shared_images(evaluation, calibration) == 0
    traced = subject.traced()
    stats = qtool.calibrate(traced, list(calibration.loader(config)), progress=True)
    plain = qtool.evaluate(subject.network, batches, progress=f"{network.arch} float")
    rows = known.setdefault(network.arch, {})
    rows["float"] = plain.as_dict()
    for row in network.rows:
        model = qtool.quantize(traced, stats, QuantizeConfig(**row.settings))
        result = qtool.evaluate(model, batches, progress=f"{network.arch} {row.name}")
        rows[row.name] = {**result.as_dict(), **compare(plain, result).as_dict()}
        write_text(out, json.dumps(known, indent=1) + "\n")
        click.echo(f"{network.arch:15} {row.name:40} {plain.top1:.2f} -> {result.top1:.2f}", err=True)


def line(arch: str, name: str, row: dict[str, Any], published: float | None, wide: bool = False) -> str:
    """One row of a table; a wide one has columns for the published figure."""
    if "agreement" not in row:
        cells = [f"{row['top1']:.2f}", "", "", ""]
    else:
        cells = [
            f"{row['top1']:.2f}",
            f"{row['top1_difference']:+.2f} ± {row['top1_standard_error']:.2f}",
            f"{row['agreement']:.1f}",
            f"{row['logit_sqnr_db']:.1f}",
        ]
    if wide and published is None:
        cells += ["", ""]
    if published is not None:
        cells += [f"{published:.2f}", f"{published - PUBLISHED_FLOAT:+.2f}"]
    return f"| {arch} | {name} | " + " | ".join(cells) + " |"


def report(known: dict[str, Any]) -> str:
    """Both tables as markdown."""
    head = "| network | configuration | top-1 | difference to float ± s.e. | agreement % | logit SQNR dB |"
    lines = [
        "# Distiller's ten rows, and six networks",
        "",
        "Command: `QTOOL_DATA=... python scripts/seed_table.py benchmarks/`",
        "",
        f"Calibrated on {CALIBRATION_IMAGES} images, evaluated on others: ImageNet networks on "
        "imagenet-sample and all 1,000 images of imagenet-nips2017, CIFAR networks on train-5085 and "
        "all 1,017 images of test-1017. "
        "Top-1 in percent; differences are paired over the same images, with their standard error.",
        "",
        NON_COMMERCIAL,
        "",
        "## The ten rows",
        "",
        "Published: ResNet-50 on the 50,000 images of ImageNet's validation set, with other weights of the "
        "same network.",
        "",
        head + " published | published difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arch in ("resnet50", "resnet18"):
        rows = known.get(arch, {})
        wanted = [Row("float", {}, PUBLISHED_FLOAT), *SEED_ROWS]
        published = {row.name: row.published if arch == "resnet50" else None for row in wanted}
        lines += [line(arch, name, rows[name], published[name], True) for name in published if name in rows]
    lines += ["", "## Six networks at 8 bits", "", head, "|---|---|---|---|---|---|"]
    for network in NETWORKS:
        rows = known.get(network.arch, {})
        names = ["float", *(row.name for row in NETWORK_ROWS)]
        lines += [line(network.arch, name, rows[name], None) for name in names if name in rows]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--only", help="Measure this network alone.")
def main(folder: Path, only: str | None) -> None:
    """Measure what is missing in FOLDER/seed_table.json, and write FOLDER/seed_table.md."""
    data = Path(os.environ.get("QTOOL_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not data.is_dir():
        sys.exit(f"{data}: no such folder; set QTOOL_DATA to the folder of test data")
    out = folder / "seed_table.json"
    known = json.loads(out.read_text()) if out.exists() else {}
    for network in NETWORKS:
        if only in (None, network.arch):
            measure(network, data, known, out)
    write_text(folder / "seed_table.md", report(known))


if __name__ == "__main__":
    main()
