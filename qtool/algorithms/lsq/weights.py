"""Weights that are trained: float values behind the integers, and the step sizes of their grids.

What is learned is counted in units of the weight itself, so that one learning rate fits all layers,
whatever the batch norm that was folded into them: a channel's values in their root mean square, its bias
in the norm of its row, its scale by the logarithm of what it has grown by.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qtool.algorithms.lsq.function import gradient_scale, lsq
from qtool.graph.fold import output_channels_first, restore_layout
from qtool.numerics.affine import along_axis
from qtool.numerics.spec import QParams
from qtool.quantizers.plan import LayerPlan

# Channels below this share of the largest one's root mean square count as that.
LEAST = 1e-3
# How far from its integer's neighbour a value starts, in steps, where it would round to that.
MARGIN = 0.01


class TrainedWeight:
    """A layer whose weight, and bias if it has one, are trained.

    Args:
        module: the layer of the float network that is quantized.
        plan: its own; a weight without a grid is trained in float.
        follow: whether its scale follows the largest magnitude of its values, in place of being learned.
        device: where it is trained.

    Attributes:
        values: what is learned of the weight, output channels first, in units of each channel.
        shift: (C,), what is learned of the bias, in units of each channel; None without one.
        log_ratio: logarithm of the scale over the one at the start, () or (C,); None where it follows, or
            there is no grid.
    """

    def __init__(self, module: nn.Module, plan: LayerPlan, follow: bool, device: torch.device) -> None:
        weight = output_channels_first(module).detach().float()
        self.module, self.plan = module, plan
        self.start = None if plan.weight is None else _on(plan.weight, device)
        if plan.weight is not None and plan.weight_q is not None:
            weight = rounding_to(weight, plan.weight, plan.weight_q)
        weight = weight.to(device)
        rows = weight.flatten(1)
        rms = rows.square().mean(dim=1).sqrt()
        self.unit = rms.clamp(min=LEAST * float(rms.max())).clamp(min=torch.finfo(torch.float32).tiny)
        self.values = (weight / along_axis(self.unit, 0, weight.dim())).requires_grad_()
        bias = getattr(module, "bias", None)
        self.start_bias = None if bias is None else bias.detach().float().to(device)
        self.reach = self.unit * rows.shape[1] ** 0.5
        self.shift = None if bias is None else torch.zeros_like(self.reach, requires_grad=True)
        self.log_ratio: Tensor | None = None
        if self.start is not None and not follow:
            self.log_ratio = torch.zeros_like(self.start.scale, requires_grad=True)
        self._largest = torch.ones(()) if self.start is None else self._magnitude(self.latent())

    def latent(self) -> Tensor:
        """The float values behind the integers, output channels first."""
        return self.values * along_axis(self.unit, 0, self.values.dim())

    def _magnitude(self, weight: Tensor) -> Tensor:
        """The largest magnitude of each channel, or of all of them, as the scale is."""
        assert self.start is not None
        found = weight.detach().abs()
        found = found.flatten(1).amax(dim=1) if self.start.spec.axis is not None else found.amax()
        return found.clamp(min=torch.finfo(torch.float32).tiny)

    def _ratio(self, latent: Tensor) -> Tensor:
        if self.log_ratio is not None:
            return self.log_ratio.exp()
        return self._magnitude(latent) / self._largest

    def weight(self) -> Tensor:
        """Its values on the grid, in the layer's own layout."""
        latent = self.latent()
        if self.start is None:
            return restore_layout(latent, self.module)
        spec, dims = self.start.spec, latent.dim()
        zero_point = along_axis(self.start.zero_point, spec.axis, dims)
        scale = along_axis(self.start.scale * self._ratio(latent), spec.axis, dims)
        count = latent[0].numel() if spec.axis is not None else latent.numel()
        balance = gradient_scale(count, spec.quant_max)
        low, high = spec.quant_min - zero_point, spec.quant_max - zero_point
        return restore_layout(lsq(latent, scale, low, high, balance), self.module)

    def bias(self) -> Tensor | None:
        """(C,), None if it has none."""
        if self.start_bias is None or self.shift is None:
            return None
        bias: Tensor = self.start_bias + self.shift * self.reach
        return bias

    def moved(self) -> Tensor | float:
        """Its scale over that of the plan."""
        if self.start is None:
            return 1.0
        with torch.no_grad():
            return self._ratio(self.latent())

    def grid(self) -> QParams | None:
        """The grid with the scale that it has now, on the CPU; None in float."""
        if self.start is None:
            return None
        with torch.no_grad():
            found = replace(self.start, scale=self.start.scale * self._ratio(self.latent()))
        return _on(found, torch.device("cpu"))


def rounding_to(weight: Tensor, qparams: QParams, weight_q: Tensor) -> Tensor:
    """The values nearest to a float weight that round to some integers of a grid.

    So training starts from the integers that a plan has, though a correction has chosen others than the
    nearest.

    Args:
        weight: (C, ...), output channels first.
        qparams: its grid.
        weight_q: integers on it, of the same shape.

    Example:
        >>> from qtool.numerics.spec import QuantSpec
        >>> grid = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec(num_bits=2))
        >>> w = torch.tensor([[0.2, 0.4, 5.0, -3.0]])
        >>> rounding_to(w, grid, torch.tensor([[0, 1, 1, -2]])).tolist()[0]
        [0.20000000298023224, 0.5099999904632568, 5.0, -3.0]
    """
    spec, dims = qparams.spec, weight.dim()
    scale = along_axis(qparams.scale, spec.axis, dims)
    zero_point = along_axis(qparams.zero_point, spec.axis, dims)
    q = weight_q.float()
    lower = torch.where(q <= spec.quant_min, -torch.inf, (q - zero_point - 0.5 + MARGIN) * scale)
    upper = torch.where(q >= spec.quant_max, torch.inf, (q - zero_point + 0.5 - MARGIN) * scale)
    return torch.minimum(torch.maximum(weight, lower), upper)


def _on(qparams: QParams, device: torch.device) -> QParams:
    return replace(qparams, scale=qparams.scale.to(device), zero_point=qparams.zero_point.to(device))
