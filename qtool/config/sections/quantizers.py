"""What is asked of the quantizer: the section `quantizers`, and what its overrides may set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from qtool.config.options import FILE, Bits, FloatBits, Pair, PositiveFloat, option
from qtool.numerics.spec import (
    CLIP_MODES,
    DEFAULT_OUTLIER_PROB,
    DEFAULT_PERCENTILE,
    MAX_BITS,
    MIN_BITS,
    MODES,
    WEIGHT_CLIP_MODES,
)


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantization, for every layer that no override names"""

    mode: str = option(
        "sym", click.Choice(MODES), "Integer grid of weights and activations.", "--qe-mode", "--qem"
    )
    mode_activations: str | None = option(
        None,
        click.Choice(MODES),
        "Grid of activations.",
        "--qe-mode-acts",
        "--qema",
        shown_default="--qe-mode",
    )
    mode_weights: str | None = option(
        None, click.Choice(MODES), "Grid of weights.", "--qe-mode-wts", "--qemw", shown_default="--qe-mode"
    )
    bits_activations: int = option(
        8, Bits(), "Bits of an activation, 2 to 16; 0 leaves them in float.", "--qe-bits-acts", "--qeba"
    )
    bits_weights: int = option(
        8, Bits(), "Bits of a weight, 2 to 16; 0 leaves them in float.", "--qe-bits-wts", "--qebw"
    )
    first_last_bits: int | None = option(
        None,
        click.IntRange(MIN_BITS, MAX_BITS),
        "Bits of the first and the last layer with weights: of their weights, inputs and outputs. What an "
        "override sets for a layer wins; what stays in float does so.",
        "--first-last-bits",
        shown_default="as all others",
    )
    bits_accum: int = option(
        32, click.IntRange(8, 64), "Bits of an accumulator, and of the bias.", "--qe-bits-accum"
    )
    accum_dtype: str = option(
        "float32",
        click.Choice(["float32", "float64"]),
        "Type that simulates the accumulator: float32 is exact up to 2^24, float64 up to 2^53. "
        "Above 16 bits of weight and activation together it is always float64.",
        "--qe-accum-dtype",
    )
    clip_activations: str = option(
        "none",
        click.Choice((*CLIP_MODES, "auto")),
        "How the range of activations is chosen (docs/estimators.md); auto is mse.",
        "--qe-clip-acts",
        "--qeca",
    )
    clip_n_stds: float | None = option(
        None, PositiveFloat(), "Standard deviations that clip mode n_std keeps.", "--qe-clip-n-stds"
    )
    clip_to_observed: bool = option(
        False,
        click.BOOL,
        "Keep the ranges of clip modes gauss and laplace within the values observed.",
        "--qe-clip-to-observed",
    )
    symmetric_unsigned: bool = option(
        False,
        click.BOOL,
        "With a symmetric grid: integers from 0 on for activations that are never negative.",
        "--qe-sym-unsigned",
    )
    clip_percentile: float | None = option(
        None,
        PositiveFloat(100.0),
        "Percent of the values that clip mode percentile keeps.",
        "--qe-clip-percentile",
        shown_default=f"{DEFAULT_PERCENTILE:g}",
    )
    clip_outlier_prob: float | None = option(
        None,
        PositiveFloat(0.5),
        "Share of values (mode quantile) or images (modes no_outliers) to leave out on each side.",
        "--qe-clip-outlier-prob",
        shown_default=f"{DEFAULT_OUTLIER_PROB:g}",
    )
    clip_weights: str = option(
        "none",
        click.Choice((*WEIGHT_CLIP_MODES, "auto")),
        "How the range of weights is chosen; auto is l4 below 8 bits, else none.",
        "--qe-clip-wts",
    )
    clip_percentile_weights: float | None = option(
        None,
        PositiveFloat(100.0),
        "Percent of the weights that --qe-clip-wts percentile keeps.",
        "--qe-clip-percentile-wts",
        shown_default=f"{DEFAULT_PERCENTILE:g}",
    )
    per_channel_weights: bool = option(
        False, click.BOOL, "One scale for each output channel of a weight.", "--qe-per-channel", "--qepc"
    )
    scale_approx_bits: int | None = option(
        None,
        click.IntRange(2, 32),
        "Replace scales by an integer of this many bits and a shift.",
        "--qe-scale-approx-bits",
        "--qesab",
    )
    scale_approx_everywhere: bool = option(
        False,
        click.BOOL,
        "With --qe-scale-approx-bits: also scales of weights, and those by which sums, concatenations and "
        "products rescale their inputs.",
        "--qe-scale-approx-everywhere",
    )
    add_rounding: str | None = option(
        None,
        click.Choice(["inputs", "sum", "fused", "none"]),
        "What an addition rounds: each input at the scale of the sum, as Distiller does; the sum once, as "
        "kernels do, which is more exact; fused: the same, with the result of a convolution or linear layer "
        "in front of it not rounded before; or nothing, so that sums and what they add up stay in float.",
        "--qe-add-rounding",
        shown_default="inputs, or what a preset chooses",
    )
    max_pool_grid: str | None = option(
        None,
        click.Choice(["own", "input"]),
        "The grid of what a max pool gives: its own, as in Distiller; or that of its input, as kernels have "
        "it, which rounds nothing and has the input's bits.",
        "--qe-max-pool-grid",
        shown_default="own, or input with a preset",
    )
    float_output: bool = option(
        False,
        click.BOOL,
        "Leave what the network gives in float: its last layers take quantized weights and inputs alone.",
        "--qe-float-output",
    )
    no_clip_layers: tuple[str, ...] = option(
        (),
        click.STRING,
        "Layers whose activations are not clipped: names or patterns, repeated or separated by commas.",
        "--qe-no-clip-layers",
        "--qencl",
        multiple=True,
        metavar="PATTERN",
    )
    no_quant_layers: tuple[str, ...] = option(
        (),
        click.STRING,
        "Layers that stay in float: names or patterns, repeated or separated by commas.",
        "--qe-no-quant-layers",
        "--qenql",
        multiple=True,
        metavar="PATTERN",
    )
    stats_file: Path | None = option(
        None, FILE, "Activation statistics from an earlier calibration.", "--qe-stats-file"
    )
    stats_as_is: bool = option(
        False,
        click.BOOL,
        "Use --qe-stats-file though its images were preprocessed in another way, or the weights were others.",
        "--qe-stats-as-is",
    )
    dynamic: bool = option(
        False, click.BOOL, "Take the range of activations from each batch that passes.", "--qe-dynamic"
    )
    per_sample: bool = option(
        False, click.BOOL, "With --qe-dynamic: from each image, whatever its neighbours.", "--per-sample"
    )
    save_fp_weights: bool = option(
        False,
        click.BOOL,
        "Keep the float weights in the checkpoint, beside the integers.",
        "--qe-save-fp-weights",
    )
    clip_half_range: bool = option(
        False, click.BOOL, "Treat every output as if it went through a ReLU, and apply one."
    )
    also_clip_weights: bool = option(False, click.BOOL, "Clip weights as activations are clipped.")
    inputs_quant_auto_fallback: bool = option(
        True, click.BOOL, "Quantize inputs that arrive in float by the settings of the output."
    )
    fpq_module: int | None = option(
        None, FloatBits(), "Run layers in a float type of 16, 32 or 64 bits in place of integers."
    )
    fake: bool | None = option(
        None, click.BOOL, "With fpq_module: whether the output is put on a grid.", layer_only=True
    )
    make_identity: bool = option(False, click.BOOL, "Replace the layer by nothing.", layer_only=True)
    quantize_inputs: bool = option(
        True,
        click.BOOL,
        "Whether a layer that computes in float puts its float inputs on a grid.",
        layer_only=True,
    )
    output_range: tuple[float, ...] | None = option(
        None, Pair(), "Smallest and largest value of the output, in place of measured ones.", layer_only=True
    )
    weight_range_factors: tuple[float, ...] | None = option(
        None, Pair(), "Factors on the weight's smallest and largest value.", layer_only=True
    )
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    input_overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


# What an override may set for the layers that its pattern matches.
OVERRIDABLE = (
    "mode",
    "mode_activations",
    "mode_weights",
    "bits_activations",
    "bits_weights",
    "bits_accum",
    "accum_dtype",
    "clip_activations",
    "clip_n_stds",
    "clip_percentile",
    "clip_outlier_prob",
    "clip_weights",
    "clip_percentile_weights",
    "clip_half_range",
    "clip_to_observed",
    "symmetric_unsigned",
    "per_channel_weights",
    "scale_approx_bits",
    "scale_approx_everywhere",
    "add_rounding",
    "inputs_quant_auto_fallback",
    "fpq_module",
    "fake",
    "make_identity",
    "quantize_inputs",
    "output_range",
    "weight_range_factors",
)
# What input_overrides, inside an override, may set for one input.
INPUT_SETTINGS = (
    "bits_activations",
    "mode",
    "clip_activations",
    "clip_n_stds",
    "clip_percentile",
    "clip_outlier_prob",
    "clip_to_observed",
)
