"""Sums and concatenations of quantized tensors: each input is brought to the output's scale first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtool.numerics.affine import approximate_multiplier
from qtool.numerics.spec import QParams
from qtool.quantizers.blocks import blocks
from qtool.quantizers.grids import Grid, clamp_accumulator, exact_ratio, largest_integer
from qtool.quantizers.limits import OutputClamp


class _Rescaling(nn.Module):
    """Brings each input to the output's scale, rounded, before they are combined."""

    def __init__(
        self,
        inputs: Sequence[QParams],
        output: QParams,
        activation: str | None,
        accum_bits: int,
        scale_approx_bits: int | None = None,
        limit: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.accum_bits = accum_bits
        ratios = [exact_ratio(q.scale.double() / output.scale.double()) for q in inputs]
        if scale_approx_bits is not None:
            ratios = [approximate_multiplier(ratio, scale_approx_bits) for ratio in ratios]
        self.ratios = [float(ratio) for ratio in ratios]
        largest = max(largest_integer(q) * ratio for q, ratio in zip(inputs, self.ratios, strict=True))
        self.saturates = largest + 1 >= 2.0 ** (accum_bits - 1)
        self.clamp = OutputClamp(output, activation, limit)
        self.grid = Grid(output)

    def rescale(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
        """Integers at the output's scale, the first of them in out; the inputs are not changed."""
        places = [out, *[None] * (len(inputs) - 1)]
        pairs = zip(inputs, self.ratios, places, strict=True)
        rescaled = [torch.mul(x, ratio, out=place).round_() for x, ratio, place in pairs]
        if self.saturates:
            rescaled = [clamp_accumulator(x, self.accum_bits) for x in rescaled]
        return rescaled


class QuantAdd(_Rescaling):
    """The sum of two or more quantized tensors."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or any(
            x.shape != inputs[0].shape or x.requires_grad for x in inputs
        ):
            return self._sum(inputs)
        result = torch.empty_like(inputs[0])
        for out, *parts in blocks(result, *inputs):
            self._sum(parts, out)
        return result

    def _sum(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        total, *others = self.rescale(inputs, out)
        for other in others:
            # Rescaling has made it this layer's own.
            total = total.add_(other) if total.shape == other.shape else total + other
        return self.clamp.apply_(total)


class QuantAddOnce(QuantAdd):
    """The sum of two or more quantized tensors, rounded once, as kernels do."""

    def rescale(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
        """The inputs in steps of the output; the first of them in out."""
        places = [out, *[None] * (len(inputs) - 1)]
        return [torch.mul(x, r, out=o) for x, r, o in zip(inputs, self.ratios, places, strict=True)]

    def _sum(self, inputs: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        total, *others = self.rescale(inputs, out)
        for other in others:
            total = total.add_(other) if total.shape == other.shape else total + other
        total = total.round_()
        return self.clamp.apply_(clamp_accumulator(total, self.accum_bits) if self.saturates else total)


class QuantCat(_Rescaling):
    """The concatenation of quantized tensors."""

    def forward(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        return self.clamp.apply_(torch.cat(self.rescale(tensors), dim))
