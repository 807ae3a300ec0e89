"""What becomes of each layer of a network, as plain data.

A plan says which kind of quantized module, on which grids, with which integers. It is what a
checkpoint stores, and all that is needed to build the quantized network again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qtool.numerics.spec import ClipSpec, InputSpec, QParams, QuantSpec
from qtool.observers.stats import ModelStats

# What can be done with a layer.
INTEGER = "integer"  # computes on integers
FAKE = "fake"  # computes in float, its output is put on a grid
WEIGHTS_ONLY = "weights only"  # weights went through a grid, computes in float
DYNAMIC = "dynamic integer"  # computes on integers, on grids found at run time
DYNAMIC_FAKE = "dynamic fake"  # computes in float, its output is put on a grid found at run time
EMBEDDING = "embedding"  # rows of an integer table
IDENTITY = "identity"  # a ReLU that the layer in front of it computes
FLOAT = "float"  # stays as it was
CAST = "cast"  # runs in a float type of its own

# Notes of layers that stay in float.
NOT_ASKED = "not asked for"
DECIDES = "only decides which branch is taken"
UNREACHED = "no calibration image took its branch; calibrate on more images to quantize it"


@dataclass(frozen=True)
class DynamicSpec:
    """What is asked of a layer whose activations' grids are found at run time.

    Args:
        output: grid of the output.
        clip: how its range is chosen.
        inputs: grid and clipping of each input that arrives in float; None to leave it so.
        activation: "relu" or "relu6" that the layer computes, or None.
    """

    output: QuantSpec
    clip: ClipSpec
    inputs: tuple[InputSpec | None, ...]
    activation: str | None = None


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        kind: one of the constants above.
        op: what it computes.
        inputs: for each tensor input, the grid that it is put on when it arrives in float; None
            when it keeps the grid it has, or stays in float.
        output: grid of the output, None for float.
        activation: "relu" or "relu6" computed by this layer's clamp.
        activation_limit: the upper end of that ReLU6, or of the one that the layer is, where each channel
            has its own: units of the output, in a shape that broadcasts to one image of it.
        weight: grid of the weight; a per-channel one counts output channels (axis 0).
        weight_q: integers of the weight, output channels first, in the smallest dtype.
        bias_q: (C,) int64, at the accumulator's scale unless there is a bias_scale.
        bias_scale: units of the output per step of bias_q, (), of a layer whose accumulator's scale is
            found at run time.
        bias: (C,) float bias of a weights-only layer, after its own quantization.
        accum_scale: units of the output per accumulator step, () or (C,).
        accum_bits: width of the accumulator.
        accum_float64: whether the simulation accumulates in float64.
        scale_approx_bits: of the requantization ratio.
        everywhere_bits: of the scales that Distiller leaves exact, see LayerSpec.
        dynamic: what is asked of tensors whose grid is found at run time.
        float_bits: width of the float type that the operation runs in, None for float32.
        float_weight: the float weight, output channels first, where it was to be kept.
        sum_once: whether an addition rounds its sum, and not each summand at the sum's scale.
        note: why the layer is not quantized as asked, in words, or "".
    """

    kind: str
    op: str
    inputs: tuple[QParams | None, ...] = ()
    output: QParams | None = None
    activation: str | None = None
    activation_limit: Tensor | None = None
    weight: QParams | None = None
    weight_q: Tensor | None = None
    bias_q: Tensor | None = None
    bias_scale: Tensor | None = None
    bias: Tensor | None = None
    accum_scale: Tensor | None = None
    accum_bits: int = 32
    accum_float64: bool = False
    scale_approx_bits: int | None = None
    everywhere_bits: int | None = None
    dynamic: DynamicSpec | None = None
    float_bits: int | None = None
    float_weight: Tensor | None = None
    sum_once: bool = False
    note: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """What becomes of every layer of a network.

    Args:
        layers: by name.
        edited_stats: the statistics it was decided from; None in dynamic mode, or when read back.
        per_sample: whether the network is to run sample by sample.
    """

    layers: Mapping[str, LayerPlan]
    edited_stats: ModelStats | None = None
    per_sample: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether grids of activations are found at run time."""
        return any(layer.dynamic is not None for layer in self.layers.values())
