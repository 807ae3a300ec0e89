"""A layer's stored integers as torch's int8 kernels take them. Nothing is quantized again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.deploy.native.containers import Container
from qtool.deploy.native.saturation import saturating_channels
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.weights import channel_magnitudes

INT8_MIN, INT8_MAX = -128, 127
# Kernels accumulate in so many bits.
ACCUM_BITS = 32
# Steps of the output that are less than the rounding of float32 at ties.
NEGLIGIBLE = 2.0**-10


class NotNative(Exception):
    """Why a layer cannot run on an int8 kernel, and what would change that."""


@dataclass(frozen=True)
class PackedWeights:
    """A layer's weight and bias as torch's kernels take them.

    Args:
        integers: (C_out, ...), int8.
        scales: () or (C_out,), float64: output steps per step of the accumulator, or units of a float output.
        zero_points: of the same shape, int64.
        bias: (C_out,), float32, in steps or units of the output, or None.
        saturating: output channels whose sums could saturate on a processor without VNNI.
    """

    integers: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None
    saturating: int = 0

    @property
    def symmetric(self) -> bool:
        """Whether all zero points are 0."""
        return not bool(self.zero_points.any())

    def tensor(self) -> Tensor:
        """The weight as a quantized tensor; its integers are those given."""
        make: Any = torch
        if self.scales.dim() == 0:
            scale, zero_point = float(self.scales), int(self.zero_points)
            return make._make_per_tensor_quantized_tensor(self.integers, scale, zero_point)  # type: ignore[no-any-return]
        return make._make_per_channel_quantized_tensor(  # type: ignore[no-any-return]
            self.integers, self.scales, self.zero_points, 0
        )


def packed_weights(plan: LayerPlan, ratio: Tensor, source: Container) -> PackedWeights:
    """A layer's stored integers, with the simulation's ratio of requantization as scales.

    Args:
        plan: of the layer.
        ratio: output steps per accumulator step, one value or one for each output channel.
        source: container of the layer's input.

    Raises:
        NotNative: if the weight has more than 8 bits, or sums exceed the accumulator.
    """
    assert plan.weight is not None and plan.weight_q is not None
    if plan.weight.spec.num_bits > 8:
        raise NotNative(f"its weight has {plan.weight.spec.num_bits} bits; --qe-bits-wts 8 or fewer")
    centered, zero_points = kernel_integers(plan)
    scales = ratio.double().reshape(zero_points.shape)
    bias = _bias_within(plan, ratio, source)
    if bias is not None:
        bias = (bias * scales).float()
    saturating = int(saturating_channels(centered, source.high).sum())
    return PackedWeights(centered.to(torch.int8), scales, zero_points, bias, saturating)


def float_weights(plan: LayerPlan, bias: Tensor | None, source: Container) -> PackedWeights:
    """A layer's stored integers for a kernel that gives floats.

    Args:
        plan: of the layer.
        bias: (C_out,), float32, or None.
        source: container of the layer's input.

    Raises:
        NotNative: if the weight has more than 8 bits or is not symmetric, or sums exceed the accumulator.
    """
    assert plan.weight is not None and plan.weight_q is not None
    if plan.weight.spec.num_bits > 8:
        raise NotNative(f"its weight has {plan.weight.spec.num_bits} bits; --qe-bits-wts 8 or fewer")
    centered, zero_points = kernel_integers(plan)
    if bool(zero_points.any()):
        raise NotNative("kernels that give floats take symmetric weights only; --qe-mode-wts sym")
    largest_input = max(source.zero_point, source.high - source.zero_point)
    if float(channel_magnitudes(plan.weight, plan.weight_q).max()) * largest_input >= 2.0 ** (ACCUM_BITS - 1):
        raise NotNative(f"its sums can exceed {ACCUM_BITS} bits; fewer --qe-bits-wts")
    saturating = int(saturating_channels(centered, source.high).sum())
    scales = plan.weight.scale.double() * source.scale
    return PackedWeights(centered.to(torch.int8), scales, zero_points, bias, saturating)


def kernel_integers(plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """The integers and zero points of a weight of up to 8 bits as kernels take them, -128 to 127.

    The zero point is taken into the integers where they still fit: every engine takes symmetric
    weights, and not every one takes others.
    """
    assert plan.weight is not None and plan.weight_q is not None
    integers, zero_points = plan.weight_q.to(torch.int64), plan.weight.zero_point.to(torch.int64)
    centered = integers - zero_points.reshape(-1, *[1] * (integers.dim() - 1))
    if int(centered.min()) >= INT8_MIN and int(centered.max()) <= INT8_MAX:
        return centered, torch.zeros_like(zero_points)
    # An asymmetric grid of 8 bits; an unsigned one is moved into the signed range.
    shift = INT8_MIN - plan.weight.spec.quant_min
    return integers + shift, zero_points + shift


def _bias_within(plan: LayerPlan, ratio: Tensor, source: Container) -> Tensor | None:
    """The integers of the bias, (C_out,), with which no sum exceeds the kernels' 32 bits.

    A channel whose weights are next to nothing has a bias at the end of the accumulator's range, where
    the simulation saturates and kernels would wrap around. Such a bias is moved by the largest
    sum, if that is nothing to its output.

    Raises:
        NotNative: if sums can exceed the accumulator's width for other reasons.
    """
    assert plan.weight is not None and plan.weight_q is not None
    largest_input = max(source.zero_point, source.high - source.zero_point)
    sums = largest_input * channel_magnitudes(plan.weight, plan.weight_q)  # (C_out,)
    limit = 2 ** (min(plan.accum_bits, ACCUM_BITS) - 1) - 1 - sums
    bias = torch.zeros_like(sums) if plan.bias_q is None else plan.bias_q.double()
    within = torch.maximum(torch.minimum(bias, limit), -limit)
    moved = (bias - within).abs() * ratio.double().flatten()
    if bool((limit < 0).any()) or bool((moved > NEGLIGIBLE).any()):
        width = min(plan.accum_bits, ACCUM_BITS)
        raise NotNative(
            f"its sums can exceed {width} bits, where the simulation saturates and kernels do not; "
            f"--qe-bits-accum {ACCUM_BITS}, or fewer --qe-bits-wts"
        )
    return None if plan.bias_q is None else within
