"""What a run works on: the sections `model`, `data` and `calibration`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.config.options import FILE, Numbers, PositiveFloat, Shape, option

DATASETS = ("folder", "imagenet", "cifar10", "cifar100", "mnist", "fashion-mnist", "npz", "digits")


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    arch: str | None = option(
        None,
        click.STRING,
        "A torchvision classification model, a CIFAR ResNet (resnet20, resnet20_cifar, ...), digits_resnet, "
        "or path/to/file.py:factory.",
        "-a",
        "--arch",
        shown_default="the checkpoint's own, or digits_resnet",
    )
    pretrained: bool = option(False, click.BOOL, "Take torchvision's trained weights.", "--pretrained")
    weights: str | None = option(
        None,
        click.STRING,
        "Which of torchvision's weights --pretrained takes, such as IMAGENET1K_V2.",
        "--weights",
        shown_default="the first published",
    )
    checkpoint: Path | None = option(
        None,
        FILE,
        "Trained weights (a state_dict, or a file that holds one), or a quantized model.",
        "--checkpoint",
        spellings=(
            (
                "--resume-from",
                "--checkpoint in Distiller's scripts; training is not resumed, so only the network in the "
                "file is used.",
            ),
            (
                "--exp-load-weights-from",
                "--checkpoint in Distiller's scripts, where it leaves training state out; qtool always does.",
            ),
        ),
    )
    num_classes: int | None = option(
        None, click.IntRange(1), "Outputs of the network.", "--num-classes", shown_default="the network's own"
    )
    input_shape: tuple[int, ...] | None = option(
        None, Shape(), "Shape of one image, as 3,224,224.", "--input-shape", shown_default="the network's own"
    )


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    path: Path | None = option(None, FILE, "The evaluation images; on the command line, the argument DATA.")
    dataset: str | None = option(
        None, click.Choice(DATASETS), "What DATA is.", "--dataset", shown_default="found out from DATA"
    )
    split: str | None = option(
        None, click.STRING, "Part of DATA to evaluate on.", "--split", shown_default="val or test"
    )
    classes: Path | None = option(
        None, FILE, "File that maps folder names to class indices: `index wnid name` lines.", "--classes"
    )
    resize: int | None = option(
        None,
        click.IntRange(0),
        "Scale the short side to this many pixels; 0 for none.",
        "--resize",
        shown_default="the model's own",
    )
    crop: int | None = option(
        None,
        click.IntRange(0),
        "Cut this square out of the centre; 0 for none.",
        "--crop",
        shown_default="the model's own",
    )
    mean: tuple[float, ...] | None = option(
        None, Numbers(), "Mean of each channel, pixels in 0 to 1.", "--mean", shown_default="the model's own"
    )
    std: tuple[float, ...] | None = option(
        None, Numbers(), "Standard deviation of each channel.", "--std", shown_default="the model's own"
    )
    effective_test_size: float = option(
        1.0,
        PositiveFloat(1.0),
        "Share of the evaluation images to use, chosen by seed.",
        "--effective-test-size",
    )
    skip_bad_images: bool = option(
        False, click.BOOL, "Leave unreadable images out and count them.", "--skip-bad-images"
    )
    batch_size: int = option(64, click.IntRange(1), "Images in a batch.", "-b", "--batch-size")
    workers: int = option(2, click.IntRange(0), "Processes that decode images.", "-j", "--workers")
    print_freq: int | None = option(
        None,
        click.IntRange(1),
        "Log a line of progress every so many batches.",
        "-p",
        "--print-freq",
        shown_default="a progress bar",
    )


BATCHWISE = ("auto", "on", "off")


@dataclass(frozen=True)
class CalibrationConfig:
    """Calibration images"""

    fraction: float | None = option(
        None,
        PositiveFloat(1.0),
        "Calibrate on this share of the evaluation images, or of --calib-data or --calib-split.",
        "--fraction",
        shown_default="0.05 where there is no other set",
    )
    calib_data: Path | None = option(
        None, FILE, "Calibrate on images of this folder or file.", "--calib-data"
    )
    calib_split: str | None = option(
        None,
        click.STRING,
        "Calibrate on this part of DATA (or of --calib-data), such as train.",
        "--calib-split",
    )
    calib_samples: int | None = option(
        None, click.IntRange(1), "Calibrate on this many images.", "--calib-samples"
    )
    calib_classes: Path | None = option(
        None, FILE, "Like --classes, for --calib-data.", "--calib-classes", shown_default="--classes"
    )
    batchwise_statistics: str = option(
        "auto",
        click.Choice(BATCHWISE),
        "What avg_min and avg_max average over: the images (auto finds the axis that holds them, "
        "on takes axis 0), or with off batches of --batch-size.",
        "--batchwise-statistics",
    )
