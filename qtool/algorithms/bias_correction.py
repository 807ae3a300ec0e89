"""Biases that take back by how much quantization moves the mean of each output channel.

`fast` compares each layer with its quantized weights on what the float network reads. `sequential` gives the
quantized layer what the quantized network in front of it makes, corrections included, so that what one layer
could not mend the next one does; it matches means where they are read, behind a ReLU and a residual sum:
equal means in front of a ReLU do not stay equal behind it, as noise alone raises them, and such errors grow
from block to block. Both take the difference of two means of the same kind, so that a layer which
quantization does not change gets no correction. The rounding and the clamp of the layer's own output are no
part of it.

Reference:
    Nagel et al. 2019, arXiv:1906.04721, section 4.2 (empirical bias correction).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.channel_means import MeanInput, Spread, mean_output
from qtool.algorithms.read_point import ReadPoint, Sampler, operands, read_point, shift_behind
from qtool.algorithms.records import CorrectionReport, LayerChange, relative_change
from qtool.graph.control import is_steered
from qtool.graph.fold import Folded, output_channels_first, restore_layout
from qtool.graph.trace import float_tensors
from qtool.numerics.affine import along_axis
from qtool.numerics.spec import QParams
from qtool.quantizers.lockstep import HAS_INTEGERS, Lockstep, Moment, float_bias
from qtool.quantizers.plan import WEIGHTED, LayerPlan, ModelPlan
from qtool.quantizers.plan.derived import saturates, with_room
from qtool.quantizers.plan.weights_only import weights_only
from qtool.quantizers.prepare import build
from qtool.quantizers.weighted import weighted_function

FAST, SEQUENTIAL = "fast_bias_correction", "bias_correction"
STEERED = "the network's code branches or loops by values, which cannot be walked layer by layer"
NOT_FINITE = "it gives NaN or infinity"
PLACES = ("activation", "output")
Found = tuple[Folded, ModelPlan, CorrectionReport]


@dataclass(frozen=True)
class FastBiasSettings:
    """Settings of correct_bias.

    Args:
        max_shift: a channel whose mean is off by more standard deviations of its float output keeps its
            bias: that is no rounding error.

    Raises:
        ValueError: if max_shift is not positive.
    """

    max_shift: float = 2.0

    def __post_init__(self) -> None:
        if not self.max_shift > 0:
            raise ValueError(f"max_shift must be positive, found {self.max_shift}")


@dataclass(frozen=True)
class SequentialBiasSettings(FastBiasSettings):
    """Settings of correct_bias_sequentially.

    Args:
        include_activations: whether the network in front of a layer has its activations on grids too, or
            its weights only.
        at: where the means are to be equal: "activation", behind the ReLU and the residual sum that the
            layer's output goes into, where it is read, or "output", in front of them.
        only_if_better: whether all biases stay as they were where the network's outputs for these images
            do not come closer to those of the float network. Behind GPTQ, which fits biases to what layers
            in front give, equal means can be worse.

    Raises:
        ValueError: if at is neither, or max_shift not positive.
    """

    include_activations: bool = True
    at: str = "activation"
    only_if_better: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at not in PLACES:
            raise ValueError(f"at must be {' or '.join(PLACES)}, found {self.at!r}")


def guarded(shift: Tensor, std: Tensor, max_shift: float) -> tuple[Tensor, Tensor]:
    """The shift of each channel, zero where it is too large to be believed.

    Args:
        shift: (C,).
        std: (C,), of the float output.
        max_shift: in standard deviations.

    Returns:
        The shifts that are left, and which were taken out, (C,) bool.

    Example:
        >>> guarded(torch.tensor([0.5, -3.0]), torch.tensor([1.0, 1.0]), 2.0)
        (tensor([0.5000, 0.0000]), tensor([False,  True]))
    """
    refused = shift.abs() > max_shift * std
    return torch.where(refused, torch.zeros_like(shift), shift), refused


def effective_weight(plan: LayerPlan, module: nn.Module, grid: QParams | None) -> Tensor:
    """The float weight that a quantized layer computes with, in the layer's layout, float64.

    Args:
        plan: of the layer.
        module: the float layer.
        grid: of its input, None for float.
    """
    assert plan.weight is not None and plan.weight_q is not None
    dims = plan.weight_q.dim()
    zero_point = along_axis(plan.weight.zero_point, plan.weight.spec.axis, dims)
    scale = plan.weight.scale.double()
    if grid is not None:  # an accumulator's step may be approximated
        assert plan.accum_scale is not None
        scale = plan.accum_scale / grid.scale.double()
    values = (plan.weight_q.double() - zero_point) * along_axis(scale, 0, dims)
    return restore_layout(values, module)


def correct_bias(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: FastBiasSettings | None = None,
) -> Found:
    """Correct the biases for the error of the weights, each layer for itself; one run of the float network.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the network that the plan quantizes.
        plan: static.
        batches: inputs, in memory.
        layers: names of those that may be changed.
        settings: None for the defaults.

    Returns:
        Changed copies, and what was changed. A layer without a bias gets one.

    Raises:
        ValueError: if the plan is dynamic, or there are no batches.

    Reference:
        What NNCF calls fast bias correction, in the difference form.
    """
    settings = settings or FastBiasSettings()
    lockstep = _lockstep(reference, folded, plan, batches)
    return _corrected(FAST, lockstep, lockstep, layers, settings, same_inputs=True)


def correct_bias_sequentially(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: SequentialBiasSettings | None = None,
) -> Found:
    """Correct the biases one layer after the other, each for the error of the whole network in front of it.

    Arguments, result and errors are those of correct_bias; costs a run of both networks, with only_if_better
    another one, and one of the quantized network as it was.
    """
    settings = settings or SequentialBiasSettings()
    lockstep = _lockstep(reference, folded, plan, batches)
    walked = lockstep
    if not settings.include_activations:
        walked = Lockstep(reference, folded, weights_only(folded.traced, plan), batches)
    found = _corrected(SEQUENTIAL, lockstep, walked, layers, settings, same_inputs=False)
    if settings.only_if_better:
        networks = [build(folded, plan).network, build(*found[:2]).network]
        before, after = _output_errors(reference, networks, batches)
        if not after < before:
            why = (
                f"the error of the network's outputs would go from {before:.3g} to {after:.3g} of their power"
            )
            left = dict.fromkeys((change.name for change in found[2].changed), why)
            return folded, plan, replace(found[2], changed=(), left={**found[2].left, **left})
    return found


def _output_errors(
    reference: fx.GraphModule, networks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> list[float]:
    """The squared error of what networks give, as a share of the power of what the reference gives."""
    errors, power = [0.0] * len(networks), 0.0
    with torch.no_grad():
        for images in batches:
            wanted = [y.double() for y in float_tensors(reference(images))]
            power += sum(float(y.square().sum()) for y in wanted)
            for number, network in enumerate(networks):
                pairs = zip(wanted, float_tensors(network(images)), strict=True)
                errors[number] += sum(float((y_hat.double() - y).square().sum()) for y, y_hat in pairs)
    return [error / max(power, torch.finfo(torch.float64).tiny) for error in errors]


def _lockstep(
    reference: fx.GraphModule, folded: Folded, plan: ModelPlan, batches: Sequence[Tensor]
) -> Lockstep:
    if plan.dynamic:
        raise ValueError("the plan is dynamic: its grids are other ones for each batch; give a static one")
    if not batches:
        raise ValueError("bias correction needs images; found no batches")
    return Lockstep(reference, folded, plan, batches)


def _corrected(
    method: str,
    lockstep: Lockstep,
    walked: Lockstep,
    layers: Collection[str],
    settings: FastBiasSettings,
    same_inputs: bool,
) -> Found:
    """Walk the networks and correct the layers.

    Args:
        method: for the report.
        lockstep: whose layers are corrected.
        walked: that gives the inputs; it sees the corrections too.
        layers: that may be changed.
        settings: how far.
        same_inputs: whether quantized layers read what the float ones do.
    """
    changed, left = [], {}
    if is_steered(lockstep.reference.graph):
        left = {
            name: STEERED for name, layer in lockstep.plan.layers.items() if _is_asked(name, layer, layers)
        }
        return lockstep.folded, lockstep.plan, CorrectionReport(method, (), left)
    behind = isinstance(settings, SequentialBiasSettings) and settings.at == "activation"
    for moment in walked.moments(quantized=not same_inputs):
        if moment.name not in layers:
            continue
        point = read_point(walked, moment.name) if behind else ReadPoint()
        shift, std = _shift(walked, moment, same_inputs)
        if point != ReadPoint():
            shift = _shift_where_read(walked, moment, point, shift, settings.max_shift * std)
        found = apply_shift(lockstep, moment.name, shift, std, settings.max_shift)
        if isinstance(found, str):
            left[moment.name] = found
            continue
        if walked is not lockstep:
            walked.change(moment.name, bias=_bias(lockstep, moment.name))
        changed.append(found)
    return lockstep.folded, lockstep.plan, CorrectionReport(method, tuple(changed), left)


def _is_asked(name: str, layer: LayerPlan, layers: Collection[str]) -> bool:
    return name in layers and layer.kind in HAS_INTEGERS and layer.op in WEIGHTED


def _bias(lockstep: Lockstep, name: str) -> Tensor:
    """A layer's float bias, zeros where it has none; (C,)."""
    module = lockstep.folded.traced.get_submodule(name)
    return float_bias(module, len(output_channels_first(module)))


def _shift(walked: Lockstep, moment: Moment, same_inputs: bool) -> tuple[Tensor, Tensor]:
    """By how much the mean of each channel is to rise, and the spread of its float output; (C,), float64."""
    name, module, compute = moment.name, moment.module, weighted_function(moment.module)
    weight = effective_weight(
        walked.plan.layers[name], walked.folded.traced.get_submodule(name), walked.input_grid(name)
    )
    read = MeanInput.of(module, walked.float_inputs(name))
    read_q = read
    if not same_inputs:
        read_q = MeanInput.of(module, walked.quant_inputs(name))
    wanted = mean_output(read, compute, _weight(module)) + float_bias(module, len(_bias(walked, name)))
    return wanted - mean_output(read_q, compute, weight) - _bias(walked, name), _output_std(walked, moment)


def _shift_where_read(
    walked: Lockstep, moment: Moment, point: ReadPoint, shift: Tensor, bound: Tensor
) -> Tensor:
    """By how much each channel is to rise for equal means where they are read; (C,), float64.

    Args:
        walked: stands in front of the layer in the quantized network, and behind it in the float one.
        moment: of the layer.
        point: where its output is read.
        shift: (C,), for equal means of the layer's own output.
        bound: (C,), the largest shift.
    """
    floats, quantized = _read_values(walked, moment, point)
    if point.high is None:
        means = [rows.mean(dim=1, dtype=torch.float64) for rows in (floats, quantized)]
        return means[0] - means[1]
    wanted = torch.minimum(floats.clamp(min=0), point.high).mean(dim=1, dtype=torch.float64)
    found, solved = shift_behind(quantized, wanted, point.high, bound)
    return torch.where(solved, found, shift)


def _read_values(walked: Lockstep, moment: Moment, point: ReadPoint) -> tuple[Tensor, Tensor]:
    """What stands in front of the ReLU in both networks, (C, elements) each, of the same elements."""
    name, module = moment.name, moment.module
    axis = _channel_axis(module)
    own = walked.folded.traced.get_submodule(name)
    weight = effective_weight(walked.plan.layers[name], own, walked.input_grid(name))
    bias = _bias(walked, name).float()
    compute = weighted_function(own)
    outputs = walked.float_walk.values(walked.node(name))
    total = sum(y.numel() for y in outputs)
    made = (compute(x, weight.float(), bias) for x in walked.quant_inputs(name))
    found = []
    for values, quantized in ((outputs, False), (made, True)):
        sampler = Sampler(axis, total)
        others = operands(walked, point, quantized)
        both = zip(values, others, strict=False)
        parts = [sampler.take(y if other is None else y + other) for y, other in both]
        found.append(torch.cat(parts, dim=1))
    return found[0], found[1]


def _channel_axis(module: nn.Module) -> int:
    """Of a layer's output, counted from the end; a batch axis may be there or not."""
    return 1 - _weight(module).dim()


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _output_std(walked: Lockstep, moment: Moment) -> Tensor:
    """The spread of the layer's output in the float network, which runs the layer for it."""
    node = walked.node(moment.name)
    walked.float_walk.past(node)
    spread = Spread(_channel_axis(moment.module))
    for y in walked.float_walk.values(node):
        spread.add(y)
    return spread.std


def apply_shift(
    lockstep: Lockstep, name: str, shift: Tensor, std: Tensor, max_shift: float
) -> LayerChange | str:
    """Add to a layer's bias what may be added.

    Args:
        lockstep: of the layer; it is changed.
        name: of the layer.
        shift: (C,), float64.
        std: (C,), of its float output; infinite where it is not known.
        max_shift: in standard deviations, see guarded.

    Returns:
        What was done, or why nothing was.
    """
    if not bool(torch.isfinite(shift).all()) or bool(std.isnan().any()):
        return NOT_FINITE
    old = _bias(lockstep, name).double()
    # What float32 cannot tell from the bias is no shift: channels without weights have no spread either.
    shift = torch.where((old + shift).float() == old.float(), 0.0, shift)
    shift, beyond = guarded(shift, std, max_shift)
    given_room = _make_room(lockstep, name, old + shift)
    saturated = ~beyond & saturates(lockstep.plan.layers[name], old + shift)
    kept = []
    if bool(beyond.any()):
        kept.append(f"{int(beyond.sum())} off by more than {max_shift:g} standard deviations")
    if bool(saturated.any()):
        bits = lockstep.plan.layers[name].accum_bits
        kept.append(f"{int(saturated.sum())} whose bias would saturate {bits} bits")
    notes = [f"of {len(old)} channels, kept the bias of {' and of '.join(kept)}"] if kept else []
    if given_room:
        notes.append(f"wider steps for {given_room} channels whose bias had saturated")
    if bool((beyond | saturated).all()) and not given_room:
        return notes[0]
    new = torch.where(saturated, old, old + shift).float()
    lockstep.change(name, bias=new)
    return LayerChange(name, relative_change(new, old), "; ".join(notes))


def _make_room(lockstep: Lockstep, name: str, bias: Tensor) -> int:
    """Widen the steps of channels whose bias does not fit, where that costs little; how many those were."""
    plan, grid = lockstep.plan.layers[name], lockstep.input_grid(name)
    if grid is None:
        return 0
    roomy = with_room(plan, grid, bias, lockstep.folded.traced.get_submodule(name))
    if roomy is plan:
        return 0
    assert plan.weight is not None and roomy.weight is not None
    lockstep.change(name, weight_q=roomy.weight_q, weight=roomy.weight)
    return int((plan.weight.scale != roomy.weight.scale).sum())
