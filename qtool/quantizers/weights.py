"""The integers of weights and biases, output channels first."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool.errors import ConfigError
from qtool.graph.fold import output_channels_first, restore_layout
from qtool.numerics.affine import (
    along_axis,
    approximate_multiplier,
    dequantize,
    qparams_from_range,
    quantize,
)
from qtool.numerics.clipping import range_of_tensor
from qtool.numerics.spec import LayerSpec, QParams, QuantSpec


def quantize_weight(
    name: str, module: nn.Module, grid: QuantSpec, asked: LayerSpec
) -> tuple[QParams, Tensor]:
    """The grid and the integers of a layer's weight, output channels first; arguments as for weight_grid."""
    qparams = weight_grid(name, module, grid, asked)
    return qparams, weight_integers(module, qparams)


def weight_integers(module: nn.Module, qparams: QParams) -> Tensor:
    """The integers of a layer's weight on a grid, output channels first, in the smallest dtype."""
    return quantize(output_channels_first(module), qparams).to(integer_dtype(qparams.spec))


def weight_grid(name: str, module: nn.Module, grid: QuantSpec, asked: LayerSpec) -> QParams:
    """The grid of a layer's weight.

    Args:
        name: of the layer, for messages.
        module: the layer.
        grid: the grid asked for.
        asked: how its range is chosen, and how its scale is approximated.

    Raises:
        ConfigError: if the weight holds NaN or infinity or spans more than float32 does, or a range or
            clipping is asked for a per-channel grid.
    """
    weight = output_channels_first(module)
    factors = asked.weight_range_factors
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"layer {name!r}: its weight holds NaN or infinity; check the checkpoint")
    if asked.weight_range is None:
        try:
            x_min, x_max = range_of_tensor(weight, grid, asked.weight_clip)
        except ValueError as error:
            raise ConfigError(f"layer {name!r}: its weight cannot be clipped: {error}") from error
        if factors is not None:
            x_min, x_max = x_min.clamp(max=0) * factors[0], x_max.clamp(min=0) * factors[1]
    elif grid.axis is None:
        x_min, x_max = (torch.tensor(float(v)) for v in asked.weight_range)
    else:
        raise ConfigError(f"layer {name!r}: one range was given for its per-channel weights")
    try:
        return qparams_from_range(x_min, x_max, grid, asked.everywhere_bits)
    except ValueError as error:  # numbers at the end of float32's range
        raise ConfigError(f"layer {name!r}: its weight has no grid: {error}; check the checkpoint") from error


def scaled_grid(grid: QParams, factors: Tensor, approx_bits: int | None) -> QParams:
    """A per-channel grid with other scales, on which integers stay the same.

    Args:
        grid: of a weight.
        factors: (C,), of the scales.
        approx_bits: of the multiplier that scales of the layer are, where they are approximated; so are
            those that are found.
    """
    scale = grid.scale.double() * factors
    if approx_bits is not None and _is_approximated(grid.scale, approx_bits):
        scale = 1 / approximate_multiplier(1 / scale, approx_bits)
    return replace(grid, scale=scale.float())


def _is_approximated(scale: Tensor, bits: int) -> bool:
    """Whether all scales are multipliers of so many bits, as --qe-scale-approx-everywhere makes them."""
    mantissa, _ = torch.frexp(1 / scale.double())
    integers = mantissa * 2**bits
    return bool(((integers - integers.round()).abs() < 2.0 ** (bits - 20)).all())


def integer_dtype(spec: QuantSpec) -> torch.dtype:
    """The smallest of torch's dtypes that holds a grid."""
    if spec.num_bits <= 8:
        return torch.int8 if spec.signed else torch.uint8
    return torch.int16 if spec.signed else torch.int32


def quantize_bias(bias: Tensor, steps_per_unit: Tensor, accum_bits: int) -> Tensor:
    """Integers of a bias at the accumulator's scale, (C,), int64."""
    limit = 2 ** (accum_bits - 1)
    return torch.round(bias.double() * steps_per_unit).clamp(-limit, limit - 1).to(torch.int64)


def accumulator_bits(grid: QParams, weight: QParams, weight_q: Tensor, bias_q: Tensor | None) -> int:
    """Bits of a signed accumulator that no input on the grid can overflow.

    Args:
        grid: of the input.
        weight: of the weight.
        weight_q: its integers, output channels first.
        bias_q: (C,), or None.
    """
    z = float(grid.zero_point)
    largest_input = max(abs(grid.spec.quant_min - z), abs(grid.spec.quant_max - z))
    sums = channel_magnitudes(weight, weight_q) * largest_input
    if bias_q is not None:
        sums = sums + bias_q.double().abs()
    return math.ceil(math.log2(float(sums.max()) + 1)) + 1


def channel_magnitudes(weight: QParams, weight_q: Tensor) -> Tensor:
    """The sum of the magnitudes of each output channel's centered integers, (C,), float64."""
    zero_point = along_axis(weight.zero_point, weight.spec.axis, weight_q.dim())
    return (weight_q.double() - zero_point).abs().flatten(1).sum(dim=1)


def fake_quantize_bias(bias: Tensor, accum_bits: int) -> Tensor:
    """A bias that went through a symmetric grid of its own, accum_bits wide."""
    scale, bias_q = bias_on_own_grid(bias, accum_bits)
    values: Tensor = bias_q * scale
    return values.to(bias.dtype)


def bias_on_own_grid(bias: Tensor, accum_bits: int) -> tuple[Tensor, Tensor]:
    """The scale, (), float64, and the integers, (C,), int64, of a bias on a symmetric grid of its own."""
    v = bias.double().abs().max()
    steps_per_unit = (2**accum_bits - 1) / 2 / torch.where(v == 0, torch.ones_like(v), v)
    return 1 / steps_per_unit, quantize_bias(bias, steps_per_unit, accum_bits)


def weight_values(weight: QParams, weight_q: Tensor) -> Tensor:
    """The float weight that integers stand for, output channels first."""
    return dequantize(weight_q.float(), weight)


def weight_centered(weight: QParams, weight_q: Tensor, layer: nn.Module) -> Tensor:
    """The centered integers of a weight in the layer's own layout, float32."""
    ones = replace(weight, scale=torch.ones_like(weight.scale))
    return restore_layout(dequantize(weight_q.float(), ones), layer)
