"""What each operation becomes on torch's quantized kernels: a table from operation to rule.

A rule gives the module that takes the place of the simulation's, called with the same arguments on
quantized tensors. It raises NotNative, with the reason, where no kernel gives the simulation's
integers up to rounding at ties; that layer then runs as in the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import fx, nn

from qtool.deploy.native.containers import LARGEST, Container
from qtool.deploy.native.exhaustive import same_joined, same_pairs
from qtool.deploy.native.kernels import (
    ONEDNN_MAX_GROUPS,
    Add,
    Cat,
    Conv,
    Geometry,
    Linear,
    Mean,
    Mul,
    PinnedConv,
    Pointwise,
    Rescale,
    RoundedAdd,
    Selecting,
    channel_highs,
)
from qtool.deploy.native.portable import FloatResult
from qtool.deploy.native.target import Target, supported_backends
from qtool.deploy.native.weights import NotNative, PackedWeights, float_weights, packed_weights
from qtool.quantizers.modules import Cast, FakeQuantize, QuantProduct
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.rescaling import QuantAdd, QuantAddOnce, QuantCat
from qtool.quantizers.weighted import QuantWeighted

# Layers whose modules end each channel elsewhere, as a ReLU6 with limits of its own asks for.
ENDS_CHANNELS = frozenset({"conv", "linear"})
# Share of the pairs of integers whose sum lies so near to a tie that float32 may take it for another side.
FEW_TIES = 16 / 2**16
# How many units of float32's last place the ratios of a sum are moved by at most, to have none of these.
NUDGES = 3
EXACT_SCALES = "int8 kernels multiply by the exact ratio of scales; leave out --qe-scale-approx-bits"


@dataclass(frozen=True)
class Site:
    """One layer to be converted.

    Args:
        node: of the simulated network.
        module: that computes it there.
        plan: of the layer.
        inputs: containers of its tensor inputs, in order.
        output: container of its result.
        target: where it is to run.
    """

    node: fx.Node
    module: nn.Module
    plan: LayerPlan
    inputs: tuple[Container, ...]
    output: Container
    target: Target


Rule = Callable[[Site], nn.Module]


def lower_weighted(site: Site) -> nn.Module:
    """A convolution or linear layer, from its stored integers."""
    module, plan = site.module, site.plan
    assert isinstance(module, QuantWeighted) and plan.weight is not None and plan.weight_q is not None
    weights = packed_weights(plan, module.requantize.ratio, site.inputs[0])
    symmetric = weights.symmetric
    # oneDNN has no fast linear layer for an input with a zero point.
    is_slow = plan.op == "linear" and site.inputs[0].zero_point != 0
    as_simulated = site.target.as_simulated and symmetric and not is_slow
    backend = "onednn" if as_simulated else site.target.backend
    if backend == "onednn" and not symmetric:
        raise NotNative("onednn takes symmetric weights only; --qe-mode-wts sym, or --qe-pytorch-backend x86")
    count, total = weights.saturating, len(weights.integers)
    if count and site.target.saturates:
        raise NotNative(
            f"sums of {count} of {total} channels could saturate on this processor; --qe-reduce-range (with "
            "--qe-convert-pytorch)"
        )
    highs = channel_highs(module.requantize.clamp, site.output)
    if plan.op == "linear":
        return Linear(weights, site.output, backend, highs)
    geometry = geometry_of(module)
    if not count or not _on_fbgemms_depthwise_kernel(weights, geometry, site.target):
        return Conv(weights, geometry, site.inputs[0], site.output, backend, highs)
    if not symmetric:
        raise NotNative(
            f"sums of {count} of {total} channels could saturate in fbgemm's depthwise kernel; "
            "--qe-mode-wts sym, or --qe-reduce-range"
        )
    return PinnedConv(weights, geometry, site.inputs[0], site.output, highs)


def lower_to_float(module: nn.Module, plan: LayerPlan, source: Container, to: Target) -> FloatResult:
    """A layer with integer weights whose result stays in float.

    Args:
        module: that computes it in the simulated network.
        plan: of the layer.
        source: container of its input.
        to: where it is to run.

    Raises:
        NotNative: if no kernel gives that.
    """
    if plan.op not in ENDS_CHANNELS or plan.activation is not None:
        raise NotNative(f"no int8 kernel for {plan.op!r} that gives floats")
    if to.backend == "qnnpack" or "onednn" not in supported_backends():
        raise NotNative("only oneDNN's int8 kernels give floats; --qe-pytorch-backend x86")
    layer: Any = module
    weights = float_weights(plan, None if layer.bias is None else layer.bias.detach(), source)
    if weights.saturating and to.saturates:
        count, total = weights.saturating, len(weights.integers)
        raise NotNative(f"sums of {count} of {total} channels could saturate on this processor")
    return FloatResult(weights, None if plan.op == "linear" else _geometry(layer), source)


def _on_fbgemms_depthwise_kernel(weights: PackedWeights, geometry: Geometry, target: Target) -> bool:
    """Whether a convolution could run on a kernel that saturates on processors with VNNI too.

    The engine x86 hands those of many groups to fbgemm, and all with asymmetric weights; and it is what
    a file made for onednn is loaded on unless one says otherwise.
    """
    depthwise = geometry.groups > 1 and weights.integers.shape[1] == 1 and weights.integers.dim() > 3
    symmetric = weights.symmetric
    few = geometry.groups <= ONEDNN_MAX_GROUPS and symmetric and target.backend != "fbgemm"
    return depthwise and not few and target.backend != "qnnpack"


def _geometry(layer: Any) -> Geometry:
    """That of a float convolution."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return _taken({name: getattr(layer, name) for name in names}, layer.weight.shape[2:])


def geometry_of(module: QuantWeighted) -> Geometry:
    """A convolution's geometry as torch's quantized kernels take it.

    Raises:
        NotNative: if they cannot.
    """
    return _taken(module.geometry, module.weight.shape[2:])


def _taken(g: Mapping[str, Any], kernel: Sequence[int]) -> Geometry:
    if g["padding_mode"] != "zeros":
        raise NotNative(f"int8 kernels pad with zeros, not by {g['padding_mode']!r}")
    padding = g["padding"]
    if padding == "valid":
        padding = [0] * len(kernel)
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(g["dilation"], kernel, strict=True)]
        if any(total % 2 for total in totals):
            raise NotNative("int8 kernels pad both sides alike, and 'same' needs one more on one side")
        padding = [total // 2 for total in totals]
    return Geometry(list(g["stride"]), list(padding), list(g["dilation"]), g["groups"])


def lower_add(site: Site) -> nn.Module:
    """A sum of two tensors; unless asked otherwise, each is rounded onto its grid before they are added.

    torch's kernel rounds the sum once. That is the same as soon as one of the two is on the output's
    grid, so one that 8 bits of that grid can hold is put there first. Ties are the exception: those of a
    sum go another way than those of the other input. So all pairs of integers are tried.
    """
    module = site.module
    assert isinstance(module, QuantAdd)
    if len(site.inputs) != 2:
        raise NotNative(f"a sum of {len(site.inputs)} tensors; int8 kernels add two")
    once = isinstance(module, QuantAddOnce)
    in_float = RoundedAdd(site.inputs, module.ratios, site.output, once)
    if _is_approximated(module.ratios, [x.scale / site.output.scale for x in site.inputs]):
        return in_float
    if once:
        for ratios in _nudged(module.ratios):
            native = Add(ratios, (None, None), site.output)
            if same_pairs(module, native, site.inputs, site.output):
                return native
        native = Add(module.ratios, (None, None), site.output)
        return native if same_pairs(module, native, site.inputs, site.output, FEW_TIES) else in_float
    for index in (0, 1):
        x, other = site.inputs[index], site.inputs[1 - index]
        on_grid = x.scale == site.output.scale
        wide = None if on_grid else _rounded(x, other, site.output, module.clamp.low, module.clamp.high)
        if on_grid or wide is not None:
            native = Add(module.ratios, (wide, None) if index == 0 else (None, wide), site.output)
            if same_pairs(module, native, site.inputs, site.output):
                return native
    return in_float


def _nudged(ratios: Sequence[float]) -> Iterator[list[float]]:
    """Ratios, and those next to them in float32, the nearest first.

    A few of all pairs of integers lie so near to a tie that the order of a kernel's operations decides. Which
    ones, the last bits of the ratios do.
    """
    steps = sorted(
        product(range(-NUDGES, NUDGES + 1), repeat=len(ratios)), key=lambda step: np.abs(step).sum()
    )
    for step in steps:
        yield [float(r + k * np.spacing(np.float32(r))) for r, k in zip(ratios, step, strict=True)]


def _is_approximated(ratios: Sequence[float], exact: Sequence[float]) -> bool:
    """Whether the simulation multiplies by something else than the ratios of scales, as kernels do."""
    return any(abs(a - b) > 1e-6 * b for a, b in zip(ratios, exact, strict=True))


def _rounded(a: Container, b: Container, output: Container, low: float, high: float) -> Container | None:
    """The output's grid, wide enough for what matters of a in a + b; None if 8 bits do not hold that.

    What a is beyond the point where every b leads out of the output's range does not matter.
    """
    a_low, a_high = _steps(a, output)
    b_low, b_high = _steps(b, output)
    smallest, largest = max(a_low, int(low) - b_high), min(a_high, int(high) - b_low)
    if largest - smallest > LARGEST:
        return None
    return Container(output.scale, -smallest, LARGEST)


def _steps(x: Container, output: Container) -> tuple[int, int]:
    """The smallest and largest value of x, in steps of the output."""
    low, high = x.limits
    return round(low / output.scale), round(high / output.scale)


def lower_cat(site: Site) -> nn.Module:
    """A concatenation; each tensor is rounded onto the output's grid."""
    assert isinstance(site.module, QuantCat)
    if _is_approximated(site.module.ratios, [x.scale / site.output.scale for x in site.inputs]):
        raise NotNative(EXACT_SCALES)
    native = Cat(site.module.ratios, site.output)
    if not same_joined(site.module, native, site.inputs, site.output):
        raise NotNative("torch's kernel rounds some of its integers to others than the simulation")
    return native


def lower_mul(site: Site) -> nn.Module:
    """A product of two tensors."""
    assert isinstance(site.module, QuantProduct)
    if len(site.inputs) != 2:
        raise NotNative(f"a product of {len(site.inputs)} tensors; int8 kernels multiply two")
    exact = site.inputs[0].scale * site.inputs[1].scale / site.output.scale
    if _is_approximated(site.module.requantize.ratio.flatten().tolist(), [exact]):
        raise NotNative(EXACT_SCALES)
    return Mul(float(site.module.requantize.ratio), site.output)


def lower_clamp(site: Site) -> nn.Module:
    """A ReLU or ReLU6 of its own: the output's container leaves out what it cuts off."""
    return _rescale(site)


def lower_selecting(site: Site) -> nn.Module:
    """An operation that gives some of its input's values."""
    # The container of the input may be larger: it is cut off where the output's ends.
    rescale = nn.Identity() if site.inputs[0] == site.output else _rescale(site)
    return Selecting(_operation(site), rescale)


def lower_hardswish(site: Site) -> nn.Module:
    """Hard-swish, on torch's fused kernel."""
    return Pointwise("hardswish", site.inputs[0], site.output)


def lower_sigmoid(site: Site) -> nn.Module:
    """The sigmoid, on torch's fused kernel."""
    return Pointwise("sigmoid", site.inputs[0], site.output)


def lower_leaky_relu(site: Site) -> nn.Module:
    """Leaky ReLU with the slope of its module."""
    operation: Any = _operation(site)
    if not isinstance(operation, nn.LeakyReLU):
        raise NotNative("leaky_relu as a function; nn.LeakyReLU is converted")
    return Pointwise("leaky_relu", site.inputs[0], site.output, (operation.negative_slope, False))


def lower_mean(site: Site) -> nn.Module:
    """A mean over windows or dimensions: torch's kernels would round it on the grid of their input too."""
    operation = _operation(site)
    if isinstance(operation, Cast):
        raise NotNative("runs in a float type of its own")
    return Mean(operation, site.inputs[0].scale / site.output.scale, site.output)


def _rescale(site: Site) -> nn.Module:
    return Rescale(site.inputs[0].scale / site.output.scale, site.output)


def _operation(site: Site) -> nn.Module:
    assert isinstance(site.module, FakeQuantize)
    return site.module.operation


# Layers that compute on integers, by what they compute.
INTEGER_RULES: dict[str, Rule] = {
    "conv": lower_weighted,
    "linear": lower_weighted,
    "add": lower_add,
    "cat": lower_cat,
    "mul": lower_mul,
}
# Layers that compute in float from one tensor on a grid, and put their output on one.
FLOAT_RULES: dict[str, Rule] = {
    "relu": lower_clamp,
    "relu6": lower_clamp,
    "max_pool2d": lower_selecting,
    "hardswish": lower_hardswish,
    "sigmoid": lower_sigmoid,
    "leaky_relu": lower_leaky_relu,
    "avg_pool2d": lower_mean,
    "adaptive_avg_pool2d": lower_mean,
    "mean": lower_mean,
}
