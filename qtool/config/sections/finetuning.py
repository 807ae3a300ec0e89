"""Quantization-aware training: the section `finetuning`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from qtool.config.options import FILE, PositiveFloat, Share, option

LEARNED, EMA = "learned", "ema"
AUTO, FLIP, CROP, FLIP_CROP, UNCHANGED = "auto", "flip", "crop", "flip-crop", "none"
AUGMENTATIONS = (AUTO, FLIP, CROP, FLIP_CROP, UNCHANGED)


@dataclass(frozen=True)
class FinetuningConfig:
    """Training of the quantized network"""

    train_data: Path | None = option(
        None,
        FILE,
        "Train on images of this folder or file.",
        "--train-data",
        shown_default="the training part of DATA",
    )
    train_split: str | None = option(
        None, click.STRING, "Train on this part of DATA (or of --train-data).", "--train-split"
    )
    train_classes: Path | None = option(
        None, FILE, "Like --classes, for --train-data.", "--train-classes", shown_default="--classes"
    )
    steps: int = option(
        500, click.IntRange(1, 10**6), "Steps of training, each on a batch of images.", "--steps"
    )
    learning_rate: float = option(
        0.005,
        PositiveFloat(10),
        "Rate of weights and biases at the start, as a share of each channel's weights; it falls to 0 along "
        "a cosine.",
        "--learning-rate",
        "--lr",
    )
    scale_learning_rate: float = option(
        0.005,
        PositiveFloat(10),
        "Rate of scales at the start, as a share of each.",
        "--scale-learning-rate",
    )
    step_sizes: str = option(
        LEARNED,
        click.Choice((LEARNED, EMA)),
        "Scales are learned (LSQ), or follow the ranges that are seen: of activations as a moving average, "
        "of weights as their largest magnitude.",
        "--step-sizes",
    )
    distillation: float = option(
        1.0,
        Share(),
        "Share of the float network's predictions in the loss; the rest is cross-entropy with the labels.",
        "--distillation",
    )
    temperature: float = option(
        1.0, PositiveFloat(), "Temperature of the predictions that are compared.", "--temperature"
    )
    augment: str = option(
        AUTO,
        click.Choice(AUGMENTATIONS),
        "Mirror half of the training images, move each by up to an eighth, or both; auto does both where "
        "images have colours, and neither where they are grey, as digits are.",
        "--augment",
    )
    held_out: float = option(
        0.1,
        Share(below_one=True),
        "Share of the training images, 1,000 at most, that are not trained on and decide whether the result "
        "is better than its start; 0 takes the result as it is.",
        "--held-out",
    )
    resume_training: Path | None = option(
        None,
        FILE,
        "Folder of a run that ended in the middle of its training, which goes on.",
        "--resume-training-from",
    )
