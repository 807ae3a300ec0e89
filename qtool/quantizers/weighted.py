"""Convolutions and linear layers on integers.

An accumulator in float32 is exact while its partial sums stay below 2^24; a convolution kernel that
transforms its input (Winograd) is off by small fractions even then, so the accumulator is rounded
back to integers before anything is done with it. Where the weights and the grid of the input show that no
sum goes beyond 2^24, and the kernel is known to add up products, there is nothing to round; and where no
sum reaches the ends of the accumulator, nothing to saturate. Both are left out there.

Weights of two-dimensional convolutions lie in memory with the channels last, which is the order that CPU
kernels are fastest in; activations follow them. See layout.py for what cannot read that order.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtool.quantizers.grids import Requantize, clamp_accumulator

# What a convolution is, apart from its weights.
GEOMETRY = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode")


class QuantWeighted(nn.Module):
    """A convolution, transposed convolution or linear layer on integers.

    Args:
        layer: the float module, for its geometry; its own weights are not kept.
        weight: centered integers, in the layer's layout.
        bias: (C,) integers at the accumulator's scale, or None.
        requantize: the output stage.
        accum_bits: width of the accumulator.
        accum_dtype: float32, exact up to 2^24, or float64, exact up to 2^53.
        largest_input: magnitude that the input's integers have at most, where that is known.
    """

    weight: Tensor
    bias: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        requantize: Requantize,
        accum_bits: int,
        accum_dtype: torch.dtype,
        largest_input: float = math.inf,
    ) -> None:
        super().__init__()
        self.compute = weighted_function(layer)
        self.geometry = {key: getattr(layer, key) for key in GEOMETRY if hasattr(layer, key)}
        self.accum_bits = accum_bits
        channels_first = not isinstance(layer, TRANSPOSED)
        sums = largest_sum(weight, bias, largest_input) if channels_first else math.inf
        self.saturates = sums >= 2.0 ** (accum_bits - 1)
        self.bias_in_sums = False  # added to the accumulator, and not to what it stands for
        self.exact = sums <= EXACT_SUMS[accum_dtype]
        if isinstance(layer, nn.Conv2d):
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight.to(accum_dtype), persistent=False)
        if bias is not None:
            trailing = 0 if isinstance(layer, nn.Linear) else weight.dim() - 2
            bias = bias.to(accum_dtype).reshape(-1, *[1] * trailing)
        self.register_buffer("bias", bias, persistent=False)
        self.requantize = requantize
        shift = None if bias is None else (bias.double() * requantize.ratio.double()).float()
        self.register_buffer("shift", shift, persistent=False)

    def accumulate(self, x: Tensor) -> Tensor:
        """The integer accumulator, bias included, saturated."""
        accumulator = self._sums(x)
        if self.bias is not None:
            accumulator.add_(self.bias)
        return clamp_accumulator(accumulator, self.accum_bits) if self.saturates else accumulator

    def _sums(self, x: Tensor) -> Tensor:
        """The accumulator without the bias."""
        x = x.to(self.weight.dtype)
        sums = self.compute(x, self.weight, None)
        return sums if self.exact and adds_up_products(x.device) else sums.round_()

    def forward(self, x: Tensor) -> Tensor:
        in_sums = self.saturates or self.bias_in_sums
        whole = (self.accumulate(x),) if in_sums else (self._sums(x), self.shift)
        result: Tensor = self.requantize(*whole)
        return result.float()


# Integers up to here, and all sums of them that stay below, are exact in a float type.
EXACT_SUMS = {torch.float32: 2.0**24, torch.float64: 2.0**53}


def largest_sum(weight: Tensor, bias: Tensor | None, largest_input: float) -> float:
    """A magnitude that no sum of a layer exceeds, in whatever order its products are added up.

    Args:
        weight: (C_out, ...), centered integers, float32.
        bias: (C_out,), integers, or None.
        largest_input: magnitude of the input's integers.
    """
    # Sums beyond 2^24 are off by so little here that they stay far beyond what matters.
    sums = weight.abs().flatten(1).sum(dim=1).double() * largest_input
    return float((sums if bias is None else sums + bias.double().abs()).max())


def adds_up_products(device: torch.device) -> bool:
    """Whether convolutions on a device are known to add up products, so that integers stay integers.

    oneDNN's direct convolutions and matrix products do, on x86. What torch takes instead of oneDNN, or on
    other processors, may transform its input.
    """
    onednn: Any = torch.backends.mkldnn
    return device.type == "cpu" and IS_X86 and bool(onednn.is_available() and onednn.enabled)


IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weighted_function(layer: nn.Module) -> Callable[..., Tensor]:
    """The computation of a convolution or linear layer, as a function of input, weight and bias or None."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # The layer's own method knows every padding mode.
        geometry = _without_parameters(layer)
        return lambda x, weight, bias=None: geometry._conv_forward(x, weight, bias)
    transposed = dict(
        zip(TRANSPOSED, (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), strict=True)
    )
    function: Any = next(f for base, f in transposed.items() if isinstance(layer, base))
    keys = ("stride", "padding", "output_padding", "groups", "dilation")
    settings = {key: getattr(layer, key) for key in keys}
    return lambda x, weight, bias=None: function(x, weight, bias, **settings)


def _without_parameters(layer: Any) -> Any:
    """A copy of a convolution that keeps its geometry and not its weights."""
    bare = copy.copy(layer)
    bare._parameters = {"weight": None, "bias": None}
    return bare
