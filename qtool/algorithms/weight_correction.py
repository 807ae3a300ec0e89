"""The mean and the spread of each output channel's weights as they were before quantization.

Two forms. `fold`, ACIQ's, keeps the integers: W' = xi * (W_q + mu), with the factor xi in the scale of the
channel and what mu adds to the output, xi * mu * (sum of the inputs), in the bias, at its mean over the
images. `requantize`, that of Intel's Neural Compressor, rounds r * W + u once more on the same grid, so that
it holds for every input.

What fits where:

| grid of the weight | fold | requantize |
|---|---|---|
| per channel | xi into the scale, exact; mu into the bias, exact in the mean | any |
| per tensor | one scale cannot hold a factor for each channel: mu into the bias alone | any |

Reference:
    Banner et al. 2019, arXiv:1810.05723, section 5 (bias-correction of weights); Intel Neural Compressor 2.6,
    WeightCorrection.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.bias_correction import NOT_FINITE
from qtool.algorithms.channel_means import MeanInput, mean_output
from qtool.algorithms.records import CorrectionReport, LayerChange, relative_change
from qtool.graph.control import is_steered
from qtool.graph.fold import Folded, output_channels_first, restore_layout
from qtool.numerics.affine import along_axis, dequantize, quantize
from qtool.numerics.spec import QParams
from qtool.quantizers.lockstep import Lockstep, Moment, float_bias
from qtool.quantizers.plan import ModelPlan
from qtool.quantizers.plan.derived import saturates
from qtool.quantizers.weighted import weighted_function
from qtool.quantizers.weights import integer_dtype, scaled_grid, weight_values

METHOD = "weight_correction"
FORMS = ("fold", "requantize")
SPREAD, PROJECTION = "spread", "projection"
FACTORS = (SPREAD, PROJECTION)
# Neural Compressor's, against weights that all became the same.
EPS = 1e-5


@dataclass(frozen=True)
class WeightCorrectionSettings:
    """Settings of correct_weights.

    Args:
        form: one of FORMS.
        factor: what form `fold` multiplies a channel by. "spread", ACIQ's, gives the weights their standard
            deviation back; "projection" makes the error of the weights orthogonal to them, so that it
            neither shrinks nor stretches what the channel answers to.

    Raises:
        ValueError: if there is no such form or factor, or the form has another factor.
    """

    form: str = "fold"
    factor: str = SPREAD

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, found {self.form!r}")
        if self.factor not in FACTORS:
            raise ValueError(f"factor must be one of {', '.join(FACTORS)}, found {self.factor!r}")
        if self.form != "fold" and self.factor != SPREAD:
            raise ValueError(f"form {self.form} has the factor {SPREAD}, found {self.factor}")


def moment_factors(weight: Tensor, weight_hat: Tensor, factor: str = SPREAD) -> tuple[Tensor, Tensor]:
    """mu and xi of each output channel, so that xi * (weight_hat + mu) has weight's mean, and its spread.

    Args:
        weight: (C, ...), float.
        weight_hat: the values that its integers stand for.
        factor: as WeightCorrectionSettings has it.

    Returns:
        mu = E[W] - E[W_hat] and, with w = W - E[W] and w_hat likewise, xi = ||w|| / ||w_hat|| for the spread
        or <w, w> / <w, w_hat> for the projection, (C,), float64; xi is 1 where all
        weights of a channel became the same.

    Example:
        >>> mu, xi = moment_factors(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        >>> mu.item(), xi.item()
        (-0.5, 2.0)
    """
    rows, rows_hat = weight.double().flatten(1), weight_hat.double().flatten(1)
    mean, mean_hat = rows.mean(1), rows_hat.mean(1)
    centered, centered_hat = rows - mean[:, None], rows_hat - mean_hat[:, None]
    if factor == PROJECTION:
        size, size_hat = centered.square().sum(1), (centered * centered_hat).sum(1)
    else:
        size, size_hat = centered.norm(dim=1), centered_hat.norm(dim=1)
    some = size_hat > 0
    xi = torch.where(some & (size > 0), size / torch.where(some, size_hat, 1.0), 1.0)
    return mean - mean_hat, xi


def requantized(weight: Tensor, grid: QParams) -> Tensor:
    """The integers of r * W + u, which has W's mean and spread once more than W's own integers.

    Args:
        weight: (C, ...), float.
        grid: of its integers.

    Returns:
        Integers of weight's shape, with r = std(W) / (std(W_hat) + 1e-5) and u = E[W] - E[r * W_hat] by
        channel, in the smallest dtype.

    Reference:
        Intel Neural Compressor 2.6, WeightCorrection.
    """
    rows = weight.double().flatten(1)
    rows_hat = dequantize(quantize(weight, grid), grid).double().flatten(1)
    r = rows.std(1, correction=0) / (rows_hat.std(1, correction=0) + EPS)
    u = rows.mean(1) - r * rows_hat.mean(1)
    dims = weight.dim()
    moved = weight.double() * along_axis(r, 0, dims) + along_axis(u, 0, dims)
    return quantize(moved.float(), grid).to(integer_dtype(grid.spec))


def correct_weights(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: WeightCorrectionSettings | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Give the weights of each output channel their mean and spread back.

    Args:
        reference: the float network, batch norms folded, which says what layers read.
        folded: the network that the plan quantizes.
        plan: static.
        batches: inputs, in memory; form `requantize` needs none, and `fold` without them leaves out mu.
        layers: names of those that may be changed.
        settings: None for the defaults.

    Returns:
        Changed copies, and what was changed.

    Raises:
        ValueError: if the plan is dynamic.
    """
    settings = settings or WeightCorrectionSettings()
    if plan.dynamic:
        raise ValueError("the plan is dynamic: its grids are other ones for each batch; give a static one")
    reads = settings.form == "fold" and not is_steered(reference.graph)
    lockstep = Lockstep(reference, folded, plan, batches if reads else [])
    changed, left = [], {}
    for moment in lockstep.moments(quantized=False):
        if moment.name not in layers:
            continue
        found = (
            _folded(lockstep, moment, settings.factor)
            if settings.form == "fold"
            else _rounded_again(lockstep, moment.name)
        )
        if isinstance(found, str):
            left[moment.name] = found
        else:
            changed.append(found)
    return lockstep.folded, lockstep.plan, CorrectionReport(METHOD, tuple(changed), left)


def _rounded_again(lockstep: Lockstep, name: str) -> LayerChange | str:
    """Form `requantize` for one layer; what was done, or why nothing was."""
    grid, before = _integers(lockstep, name)
    weight_q = requantized(output_channels_first(lockstep.folded.traced.get_submodule(name)), grid)
    if torch.equal(weight_q, before):
        return "its integers stay the same"
    lockstep.change(name, weight_q=weight_q)
    share = 100 * float((weight_q != before).double().mean())
    values = [weight_values(grid, integers) for integers in (weight_q, before)]
    return LayerChange(name, relative_change(*values), f"{share:.1f} % of the integers are others")


def _folded(lockstep: Lockstep, moment: Moment, factor: str) -> LayerChange | str:
    """Form `fold` for one layer; what was done, or why nothing was."""
    name = moment.name
    grid, weight_q = _integers(lockstep, name)
    module = lockstep.folded.traced.get_submodule(name)
    weight = output_channels_first(module)
    mu, xi = moment_factors(weight, weight_values(grid, weight_q), factor)
    per_channel = grid.spec.axis is not None
    if not per_channel:
        xi = torch.ones_like(xi)
    read = MeanInput.of(module, lockstep.float_inputs(name))
    old = float_bias(module, len(weight)).double()
    added = _sum_of_inputs(module, read, xi * mu) if read.images else torch.zeros_like(old)
    if not bool(torch.isfinite(added).all()):
        return NOT_FINITE
    if per_channel:
        lockstep.change(name, weight=scaled_grid(grid, xi, lockstep.plan.layers[name].scale_approx_bits))
    saturated = saturates(lockstep.plan.layers[name], old + added)
    new = torch.where(saturated, old, old + added).float()
    if not per_channel and torch.equal(new, old.float()):
        return "one scale for the whole weight cannot hold a factor for each channel, " + (
            "and no images say what the mean of the weights adds"
            if not read.images
            else "and the means agree"
        )
    if not torch.equal(new, old.float()):
        lockstep.change(name, bias=new)
    return LayerChange(name, *_words(xi, new, old, per_channel, bool(read.images), int(saturated.sum())))


def _words(
    xi: Tensor, new: Tensor, old: Tensor, per_channel: bool, read: bool, saturated: int
) -> tuple[float, str]:
    """The size of the change, of the scales or else of the bias, and more in words."""
    size = relative_change(new, old)
    parts = [f"bias by {100 * size:.2g} %" if read else "the bias stays: no images"]
    if per_channel:
        size = relative_change(xi, torch.ones_like(xi))
        parts.insert(0, f"scales by up to {100 * float((xi - 1).abs().max()):.2g} %")
    else:
        parts.append("the spread stays: one scale for the whole weight")
    if saturated:
        parts.append(f"{saturated} channels kept a bias that would saturate the accumulator")
    return size, ", ".join(parts)


def _integers(lockstep: Lockstep, name: str) -> tuple[QParams, Tensor]:
    plan = lockstep.plan.layers[name]
    assert plan.weight is not None and plan.weight_q is not None
    return plan.weight, plan.weight_q


def _sum_of_inputs(module: nn.Module, read: MeanInput, factor: Tensor) -> Tensor:
    """The mean output of a layer all of whose weights are factor, by output channel; (C,)."""
    shape = output_channels_first(module).shape
    weight = along_axis(factor, 0, len(shape)).expand(shape)
    return mean_output(read, weighted_function(module), restore_layout(weight, module))
