"""Bits for each layer within a budget: the section `mixed`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from qtool.config.options import PositiveFloat, Widths, option
from qtool.numerics.spec import MAX_BITS


@dataclass(frozen=True)
class MixedConfig:
    """Mixed precision, bits for each layer"""

    choices: tuple[int, ...] | None = option(
        None,
        Widths(),
        "Choose the bits of each layer's weights among these, within one of the budgets below.",
        "--bits",
        shown_default="the same for all layers",
    )
    size_budget: float | None = option(
        None,
        PositiveFloat(1.0),
        "What all weights may take, as a share of their bytes in float32.",
        "--size-budget",
    )
    mean_bits: float | None = option(
        None,
        PositiveFloat(float(MAX_BITS)),
        "Bits that a quantized weight may take on average.",
        "--mean-bits",
    )
    bops_budget: float | None = option(
        None,
        PositiveFloat(),
        "Bit operations (multiplications times bits of both factors), as a share of those at 8 bits.",
        "--bops-budget",
    )
    mixed_activations: bool = option(
        False, click.BOOL, "Choose the bits of each layer's output too.", "--mixed-activations"
    )
    mixed_images: int = option(
        64, click.IntRange(1), "Calibration images that bits are chosen on, by seed.", "--mixed-images"
    )

    @property
    def budgets(self) -> dict[str, float]:
        """Those that were given, by flag."""
        given = {
            "--size-budget": self.size_budget,
            "--mean-bits": self.mean_bits,
            "--bops-budget": self.bops_budget,
        }
        return {flag: value for flag, value in given.items() if value is not None}
