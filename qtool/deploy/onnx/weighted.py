"""How convolutions and linear layers are written, in float and with integer weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.onnx.grids import constant_on_grid, integer_bias
from qtool.deploy.onnx.pooling import PAD_MODES
from qtool.deploy.onnx.site import Site
from qtool.deploy.onnx.writer import NotInOnnx
from qtool.graph.fold import swap_channels
from qtool.numerics.spec import QParams
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.weighted import QuantWeighted
from qtool.quantizers.weights import channel_magnitudes

# Steps of the output that are less than the rounding of float32.
NEGLIGIBLE = 2.0**-10
ACCUM_BITS = 32


def write_float(site: Site) -> str:
    """A layer with float weights."""
    layer: Any = site.module
    is_linear = isinstance(layer, nn.Linear)
    transposes = is_linear and len(site.sizes()) != 2
    weight = layer.weight.t() if transposes else layer.weight
    bias = None if layer.bias is None else site.w.tensor(layer.bias, f"{site.name}.bias")
    return _compute(site, layer, site.w.tensor(weight, f"{site.name}.weight"), bias)


def write_weights_only(site: Site, plan: LayerPlan) -> str:
    """A layer whose weights are integers, and whose activations are floats."""
    assert plan.weight is not None and plan.weight_q is not None
    layer: Any = site.module[0] if isinstance(site.module, nn.Sequential) else site.module
    bias = None if layer.bias is None else site.w.tensor(layer.bias, f"{site.name}.bias")
    weight = _weight(site, layer, plan.op, plan.weight, plan.weight_q)
    return _compute(site, layer, weight, bias)


def write_integer(site: Site, plan: LayerPlan, grid: QParams) -> str:
    """A layer on integers, up to the grid of its output.

    Args:
        site: where it is.
        plan: of it.
        grid: of its input.

    Raises:
        NotInOnnx: if its sums can saturate, or the opset has no type for its weights.
    """
    module = site.module
    assert isinstance(module, QuantWeighted)
    assert plan.weight is not None and plan.weight_q is not None
    weight = plan.weight
    if plan.scale_approx_bits is not None:
        weight = QParams(_approximated_scale(module, plan, grid), weight.zero_point, weight.spec)
    integers, bias = _bias_within(plan, grid), None
    if integers is not None:
        scale = grid.scale.double() * weight.scale.double()
        bias = integer_bias(site.w, integers, scale, f"{site.name}.bias")
    layer = _Geometry(module.geometry)
    return _compute(site, layer, _weight(site, layer, plan.op, weight, plan.weight_q), bias)


class _Geometry:
    """A convolution's settings as attributes, as a float module has them; a linear layer has none."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)


def _approximated_scale(module: QuantWeighted, plan: LayerPlan, grid: QParams) -> Tensor:
    """The scales of a weight with which the result is that of the approximated multiplier."""
    assert plan.weight is not None and plan.output is not None
    ratio = module.requantize.ratio.double().flatten()
    scale = ratio * plan.output.scale.double() / grid.scale.double()
    return scale.reshape(plan.weight.scale.shape).float()


def _bias_within(plan: LayerPlan, grid: QParams) -> Tensor | None:
    """The integers of a bias with which no sum exceeds the 32 bits of integer kernels, (C,); None without.

    A channel whose weights are next to nothing has a bias at the end of the accumulator's range. It is moved
    by the largest sum, if that is nothing to its output.

    Raises:
        NotInOnnx: if there are none, or the simulation saturates at fewer bits.
    """
    assert plan.weight is not None and plan.weight_q is not None
    assert plan.output is not None and plan.accum_scale is not None
    zero_point = float(grid.zero_point)
    largest_input = max(abs(grid.spec.quant_min - zero_point), abs(grid.spec.quant_max - zero_point))
    sums = largest_input * channel_magnitudes(plan.weight, plan.weight_q)  # (C_out,)
    bias = torch.zeros_like(sums) if plan.bias_q is None else plan.bias_q.double()
    if plan.accum_bits < ACCUM_BITS and bool((sums + bias.abs() >= 2.0 ** (plan.accum_bits - 1)).any()):
        raise NotInOnnx(
            f"its sums can exceed {plan.accum_bits} bits, where the simulation saturates; --qe-bits-accum 32"
        )
    if plan.weight.spec.num_bits > 8 or grid.spec.num_bits > 8:
        return plan.bias_q  # runtimes compute these in float
    limit = 2.0 ** (ACCUM_BITS - 1) - 1 - sums
    within = torch.maximum(torch.minimum(bias, limit), -limit)
    moved = (bias - within).abs() * plan.accum_scale.double() / plan.output.scale.double()
    if bool((limit < 0).any()) or bool((moved > NEGLIGIBLE).any()):
        raise NotInOnnx("its sums can exceed the 32 bits of integer kernels; fewer --qe-bits-wts")
    return None if plan.bias_q is None else within.to(torch.int64)


def _weight(site: Site, layer: Any, op: str, grid: QParams, weight_q: Tensor) -> str:
    """The weight as ONNX lays it out, dequantized."""
    name = f"{site.name}.weight"
    if op == "linear" and len(site.sizes()) != 2:
        return constant_on_grid(site.w, grid, weight_q.t(), name, axis=1)
    if op != "conv_transpose":
        return constant_on_grid(site.w, grid, weight_q, name, axis=0)
    if grid.scale.dim() == 0 or layer.groups == 1:
        return constant_on_grid(site.w, grid, swap_channels(weight_q, layer.groups), name, axis=1)
    # Each group's output channels stand in the same places of axis 1, so one axis cannot tell them apart.
    groups, shape = layer.groups, list(weight_q.shape)  # (G * B, A, ...)
    floats = constant_on_grid(site.w, grid, weight_q, f"{name}_channels", axis=0)
    apart = site.w.numbers([groups, shape[0] // groups, *shape[1:]])
    grouped = site.op("Reshape", floats, apart, name=f"{name}_groups")
    perm = [0, 2, 1, *range(3, len(shape) + 1)]
    swapped = site.op("Transpose", grouped, name=f"{name}_swapped", perm=perm)
    together = site.w.numbers([groups * shape[1], shape[0] // groups, *shape[2:]])
    return site.op("Reshape", swapped, together, name=name)


def _compute(site: Site, layer: Any, weight: str, bias: str | None) -> str:
    """The layer itself, on floats that weight and bias stand for."""
    x = site.tensor()
    op = site.node.meta["op"]
    if op == "linear":
        if len(site.sizes()) == 2:
            return site.op("Gemm", *filter(None, [x, weight, bias]), transB=1)
        if bias is None:
            return site.op("MatMul", x, weight)
        return site.op("Add", site.op("MatMul", x, weight, name=f"{site.name}_product"), bias)
    kernel = [int(size) for size in _kernel(site, layer)]
    inputs = list(filter(None, [_padded(site, layer, x, kernel), weight, bias]))
    common = {"strides": list(layer.stride), "dilations": list(layer.dilation), "group": layer.groups}
    if op == "conv_transpose":
        pads, more = list(layer.padding), list(layer.output_padding)
        return site.op("ConvTranspose", *inputs, pads=2 * pads, output_padding=more, **common)
    pads = [0] * (2 * len(kernel)) if _fills(layer) else _pads(layer, kernel)
    return site.op("Conv", *inputs, pads=pads, kernel_shape=kernel, **common)


def _kernel(site: Site, layer: Any) -> list[int]:
    shape = getattr(layer, "kernel_size", None)
    if shape is None:
        assert isinstance(site.module, QuantWeighted)
        shape = site.module.weight.shape[2:]
    return list(shape)


def _pads(layer: Any, kernel: list[int]) -> list[int]:
    """At the beginning of every spatial dimension, then at the end."""
    if layer.padding == "valid":
        return [0] * (2 * len(kernel))
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
        return [t // 2 for t in totals] + [t - t // 2 for t in totals]
    return 2 * list(layer.padding)


def _fills(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "zeros") != "zeros"


def _padded(site: Site, layer: Any, x: str, kernel: list[int]) -> str:
    """The input, padded with other values than zeros if the layer does so."""
    if not _fills(layer):
        return x
    pads, count = _pads(layer, kernel), len(kernel)
    both = [0, 0, *pads[:count], 0, 0, *pads[count:]]
    if layer.padding_mode == "circular" and site.w.opset < 19:
        raise NotInOnnx(f"pads in a circle, which opset {site.w.opset} lacks; --opset 19 or newer")
    mode = PAD_MODES[layer.padding_mode]
    return site.op("Pad", x, site.w.numbers(both), name=f"{site.name}_padded", mode=mode)
