"""Which layers are measured, how, and what is said of them: the section `sensitivity`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from qtool.config.options import Widths, WorkersOf, option

DAMAGE, GAIN, BOTH = "damage", "gain", "both"
GROUP, LAYER = "group", "layer"
BY = ("sqnr", "kl", "loss", "top1")


@dataclass(frozen=True)
class SensitivityConfig:
    """Sensitivity"""

    direction: str = option(
        DAMAGE,
        click.Choice((DAMAGE, GAIN, BOTH)),
        "The damage when only one group is quantized, the gain when only it is left in float, or both.",
        "--direction",
    )
    by: str = option(
        BY[0],
        click.Choice(BY),
        "What groups are sorted by: SQNR of the logits, KL divergence of the predictions, loss, or top-1.",
        "--by",
    )
    per: str = option(
        GROUP,
        click.Choice((GROUP, LAYER)),
        "What is measured at once: a group of layers whose outputs meet, or each layer.",
        "--per",
    )
    widths: tuple[int, ...] | None = option(
        None,
        Widths(),
        "Bits of weights and activations to measure at, one or several numbers.",
        "--bits",
        shown_default="as each layer's settings say",
    )
    measured_images: int = option(
        64, click.IntRange(1), "Calibration images to measure on, chosen by seed.", "--images"
    )
    exact: bool = option(
        False,
        click.BOOL,
        "Measure the damage of each group by running the network, rather than estimating it for all at once.",
        "--exact",
    )
    worst: int = option(
        3, click.IntRange(0), "How many of the worst groups to give overrides for.", "--worst"
    )
    point_workers: str = option(
        "1",
        WorkersOf(),
        "Who measures groups: so many processes, or a Ray cluster (the extra qtool[ray]).",
        "--workers",
        metavar="N|ray",
    )
