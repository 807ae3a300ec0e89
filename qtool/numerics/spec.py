"""The grids of quantization: asked for (QuantSpec, LayerSpec) and found (QParams).

This module imports torch for type checking only, so that the command line can read its
options without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("sym", "sym_restr", "asym_s", "asym_u")
# Ranges from moments, from a histogram, and from the range of each image.
MOMENT_MODES = ("none", "avg", "n_std", "gauss", "laplace")
HISTOGRAM_MODES = ("percentile", "quantile", "mse", "kl")
IMAGE_MODES = ("median", "mean_no_outliers", "median_no_outliers")
CLIP_MODES = (*MOMENT_MODES, *HISTOGRAM_MODES, *IMAGE_MODES)
# Those that a live tensor, such as a weight or a batch in dynamic mode, can be clipped by.
LIVE_CLIP_MODES = (*MOMENT_MODES, "percentile", "quantile", "mse")
# Those that weights have of their own; none is by their smallest and largest value.
WEIGHT_CLIP_MODES = ("none", "mse", "l4", "percentile")
# The setting of a ClipSpec that a mode reads.
SETTING_OF_MODE = {
    "n_std": "n_stds",
    "percentile": "percentile",
    "quantile": "outlier_prob",
    "mean_no_outliers": "outlier_prob",
    "median_no_outliers": "outlier_prob",
}
DEFAULT_PERCENTILE = 99.99
DEFAULT_OUTLIER_PROB = 1e-4
MIN_BITS, MAX_BITS = 2, 16
# Those of ACIQ, and the widest grid that they have published constants for.
ACIQ_MODES = ("gauss", "laplace")
ACIQ_MAX_BITS = 8


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid asked for; no tensors.

    Args:
        num_bits: width of an integer, 2 to 16.
        symmetric: whether zero_point is fixed at 0, and the range is [-v, v], or [0, v] if not signed.
        signed: whether the integers start at -2^(num_bits-1) rather than at 0.
        narrow_range: whether the lowest integer of a symmetric grid is left out.
        axis: the axis kept, one scale for each of its indices; None is per tensor.

    Raises:
        ValueError: if num_bits is out of range, or narrow_range is asked of an asymmetric grid.

    Example:
        >>> spec = QuantSpec(num_bits=4)
        >>> spec.quant_min, spec.quant_max
        (-8, 7)
    """

    num_bits: int = 8
    symmetric: bool = True
    signed: bool = True
    narrow_range: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.num_bits <= MAX_BITS:
            raise ValueError(f"num_bits must be {MIN_BITS} to {MAX_BITS}, found {self.num_bits}")
        if self.narrow_range and not (self.symmetric and self.signed):
            raise ValueError("narrow_range needs a symmetric, signed grid")

    @classmethod
    def from_mode(cls, mode: str, num_bits: int = 8, axis: int | None = None) -> QuantSpec:
        """The grid that one of Distiller's four mode names stands for.

        Example:
            >>> QuantSpec.from_mode("asym_u").quant_max
            255
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}")
        return cls(
            num_bits=num_bits,
            symmetric=mode.startswith("sym"),
            signed=mode != "asym_u",
            narrow_range=mode == "sym_restr",
            axis=axis,
        )

    def unsigned(self) -> QuantSpec:
        """The grid of as many bits for values that are never negative; an asymmetric one is it already.

        Example:
            >>> QuantSpec.from_mode("sym_restr").unsigned().quant_max
            255
        """
        return replace(self, signed=False, narrow_range=False) if self.symmetric else self

    @property
    def mode(self) -> str:
        """Distiller's name of this grid; "sym_u" for the symmetric, unsigned one that it lacks."""
        if self.symmetric:
            return "sym_restr" if self.narrow_range else "sym" if self.signed else "sym_u"
        return "asym_s" if self.signed else "asym_u"

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        if not self.signed:
            return 0
        return int(self.narrow_range) - (1 << (self.num_bits - 1))

    @property
    def quant_max(self) -> int:
        """The largest integer."""
        return (1 << (self.num_bits - int(self.signed))) - 1


@dataclass(frozen=True)
class QParams:
    """The grid found: x_hat = (x_q - zero_point) * scale.

    Args:
        scale: units of x per integer step, positive, shape () or (C,), float32.
        zero_point: the integer that stands for 0.0, same shape as scale, float32 holding integers.
        spec: the grid they belong to; its axis is set exactly when scale has shape (C,).
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def same_grid(self, other: QParams) -> bool:
        """Whether both stand for exactly the same set of representable values."""
        return self is other or (
            self.spec == other.spec
            and bool((self.scale == other.scale).all())
            and bool((self.zero_point == other.zero_point).all())
        )


@dataclass(frozen=True)
class ClipSpec:
    """How a range is chosen from statistics (spec: clipping.py).

    Args:
        mode: one of CLIP_MODES.
        n_stds: how many standard deviations mode n_std keeps on each side of the mean.
        half_range: whether the values follow a ReLU, for the tables of gauss and laplace, and for
            histograms of the values in front of it.
        to_observed: whether gauss and laplace stay within the smallest and largest value observed.
        percentile: how many percent of the values mode percentile keeps, above 0 to 100.
        outlier_prob: share of the values that mode quantile leaves out on each side, and beyond
            which the ranges of images are outliers to the modes no_outliers, 0 to 0.5.
    """

    mode: str = "none"
    n_stds: float | None = None
    half_range: bool = False
    to_observed: bool = False
    percentile: float = DEFAULT_PERCENTILE
    outlier_prob: float = DEFAULT_OUTLIER_PROB


@dataclass(frozen=True)
class InputSpec:
    """What is asked of one input that arrives in float."""

    grid: QuantSpec
    clip: ClipSpec = field(default_factory=ClipSpec)


@dataclass(frozen=True)
class LayerSpec:
    """What is asked of one layer; None means "stays in float".

    Args:
        weight: grid of the weights, for the layers that have any.
        output: grid of the outputs.
        input: grid of the inputs that arrive in float; None takes that of the output, and without one
            leaves them in float.
        inputs: for single inputs that arrive in float, by number; the others take the output's settings.
        input_fallback: whether they may; otherwise a float input without an entry is an error.
        quantize_inputs: whether a layer that computes in float puts its float inputs on a grid.
        clip: how the range of outputs and of fresh inputs is chosen.
        accum_bits: width of the accumulator, and of the bias.
        accum_float64: whether sums are accumulated in float64 rather than float32.
        scale_approx_bits: bits of the integer multiplier that replaces a float scale, or None.
        scale_approx_everywhere: whether it also replaces the scales that Distiller leaves exact.
        symmetric_unsigned: whether symmetric grids of values that are never negative are unsigned.
        output_range: (min, max) of the output, in place of one chosen from statistics.
        weight_range: (min, max) of a weight that is quantized per tensor, in place of its own.
        weight_range_factors: factors on the weight's own smallest and largest value, per channel too.
        weight_clip: how the range of weights is chosen; None is by their smallest and largest value.
        float_bits: run the layer in a float type of so many bits, and not on integers.
        fake: with float_bits, whether the output is put on a grid; None: only where there is no
            integer computation.
        identity: replace the layer by nothing.
        keep_float_weight: whether the float weight stays beside the integers.
        sum_once: whether an addition rounds its sum, and not each summand at the sum's scale.
        carried: the number of an addition's input that is added as it arrives, in float; None for none.
        on_input_grid: whether the output is on the grid of the first input, where that has one and no
            output_range is given; for operations that hand on values of their input.
    """

    weight: QuantSpec | None = None
    output: QuantSpec | None = None
    input: QuantSpec | None = None
    inputs: Mapping[int, InputSpec] = field(default_factory=dict)
    input_fallback: bool = True
    quantize_inputs: bool = True
    clip: ClipSpec = field(default_factory=ClipSpec)
    accum_bits: int = 32
    accum_float64: bool = False
    scale_approx_bits: int | None = None
    scale_approx_everywhere: bool = False
    symmetric_unsigned: bool = False
    output_range: tuple[float, float] | None = None
    weight_range: tuple[float, float] | None = None
    weight_range_factors: tuple[float, float] | None = None
    weight_clip: ClipSpec | None = None
    float_bits: int | None = None
    fake: bool | None = None
    identity: bool = False
    keep_float_weight: bool = False
    sum_once: bool = False
    carried: int | None = None
    on_input_grid: bool = False

    @property
    def everywhere_bits(self) -> int | None:
        """Of the multiplier that replaces the scales that Distiller leaves exact: of weights, and of
        the inputs that are added, concatenated or multiplied; None leaves these exact."""
        return self.scale_approx_bits if self.scale_approx_everywhere else None
