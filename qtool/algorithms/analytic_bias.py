"""Bias correction without images: what layers read is known from the batch norms in front of them.

A batch norm with shift beta and scale gamma gives values of mean beta and standard deviation |gamma|. Taken
as normally distributed, they have a known mean behind a ReLU or ReLU6 too; sums, concatenations and averages
keep means. With the mean of its input, the mean error of a layer's quantized weights follows.

Reference:
    Nagel et al. 2019, arXiv:1906.04721, section 4.2.1 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.bias_correction import FastBiasSettings, Found, apply_shift, effective_weight
from qtool.algorithms.channel_means import MeanInput, mean_output
from qtool.algorithms.records import CorrectionReport
from qtool.graph import ops
from qtool.graph.fold import Folded, fold_batch_norms
from qtool.graph.trace import layers as traced_layers
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.lockstep import Lockstep
from qtool.quantizers.plan import ModelPlan
from qtool.quantizers.weighted import weighted_function

METHOD = "analytic_bias_correction"
NOT_KNOWN = "no batch norm in front of it says the mean of what it reads"
LIMITS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
SHAPES = ops.KEEPS_GRID | {"flatten", "view", "reshape", "squeeze"}
AVERAGES = frozenset({"avg_pool2d", "adaptive_avg_pool2d", "mean"})


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation by channel, (C,), float64; no std where the values are not normal."""

    mean: Tensor
    std: Tensor | None = None


def clipped_normal_mean(mean: Tensor, std: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """The mean of a normal variable that is clipped to [low, high]; a ReLU by default.

    Args:
        mean, std: of the variable, any shape; std may be zero.
        low, high: the ends, high may be infinite.

    Returns:
        s phi(a) + mu (1 - Phi(a)) with a = -mu / s for a ReLU, and what the upper end takes away.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(clipped_normal_mean(0 * one, one).item(), 6)  # 1 / sqrt(2 pi)
        0.398942
    """
    mean, std = mean.double(), std.double()
    safe = torch.where(std > 0, std, 1.0)
    a, b = (low - mean) / safe, (high - mean) / safe
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    density_a, density_b = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (a, b))
    result = low * below + mean * (1 - below - above) + safe * (density_a - density_b)
    if math.isfinite(high):
        result = result + high * above
    return torch.where(std > 0, result, mean.clamp(low, high))


def correct_bias_without_data(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    *,
    traced: fx.GraphModule,
    layers: Collection[str],
    settings: FastBiasSettings | None = None,
) -> Found:
    """Correct the biases for the mean error of the weights, from the parameters of batch norms alone.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the network that the plan quantizes.
        plan: static.
        traced: the float network with its batch norms.
        layers: names of those that may be changed.
        settings: None for the defaults; a layer without a batch norm of its own has no spread to compare
            its shift with.

    Returns:
        Changed copies, and what was changed. A layer whose input is not known keeps its bias; so do those
        behind a layer whose weights were changed since its batch norm was folded, such as by equalization.

    Raises:
        ValueError: if the plan is dynamic.
    """
    settings = settings or FastBiasSettings()
    if plan.dynamic:
        raise ValueError("the plan is dynamic: its grids are other ones for each batch; give a static one")
    known = known_means(reference, batch_norm_outputs(traced, reference))
    lockstep = Lockstep(reference, folded, plan, [])
    changed, left = [], {}
    for moment in lockstep.moments(quantized=False):
        if moment.name not in layers:
            continue
        node = lockstep.node(moment.name)
        read = known[tensor_inputs(node)[0]]
        if read is None:
            left[moment.name] = NOT_KNOWN
            continue
        shift = _shift(lockstep, moment.name, moment.module, read.mean)
        own = known[node]
        spread = torch.full_like(shift, math.inf) if own is None or own.std is None else own.std
        found = apply_shift(lockstep, moment.name, shift, spread, settings.max_shift)
        if isinstance(found, str):
            left[moment.name] = found
        else:
            changed.append(found)
    return lockstep.folded, lockstep.plan, CorrectionReport(METHOD, tuple(changed), left)


def _shift(lockstep: Lockstep, name: str, module: nn.Module, mean: Tensor) -> Tensor:
    """By how much the mean of each channel is to rise for an input of a known mean; (C,), float64."""
    source = tensor_inputs(lockstep.node(name))[0].meta["value"]
    rows = isinstance(module, nn.Linear)
    image = mean if rows else mean.reshape(-1, *[1] * (source.dim() - 2)).expand(source.shape[1:])
    read, compute = MeanInput.of(module, [image[None]]), weighted_function(module)
    own = lockstep.folded.traced.get_submodule(name)
    weight_hat = effective_weight(lockstep.plan.layers[name], own, lockstep.input_grid(name))
    weight = module.weight
    assert isinstance(weight, Tensor)
    return mean_output(read, compute, weight) - mean_output(read, compute, weight_hat)


def batch_norm_outputs(traced: fx.GraphModule, reference: fx.GraphModule) -> dict[str, Normal]:
    """What batch norms say of outputs: of those that stand alone, and of layers that took one in.

    Args:
        traced: the float network with its batch norms.
        reference: the same network with them folded; a layer with other weights than folding gave it is
            left out.
    """
    folded = fold_batch_norms(traced)
    norms = {name: module for name, _, module in traced_layers(traced) if _is_batch_norm(module)}
    owners = {name: folded.pairs.get(name, name) for name in norms}
    same = {owner for owner in owners.values() if _same_layer(folded.traced, reference, owner)}
    return {owner: _normal(norms[name]) for name, owner in owners.items() if owner in same}


def _is_batch_norm(module: nn.Module) -> bool:
    return ops.module_op(module) == "batch_norm" and getattr(module, "running_mean", None) is not None


def _normal(norm: nn.Module) -> Normal:
    mean = norm.running_mean
    assert isinstance(mean, Tensor)
    beta = mean.new_zeros(mean.shape) if norm.bias is None else norm.bias
    gamma = mean.new_ones(mean.shape) if norm.weight is None else norm.weight
    assert isinstance(beta, Tensor) and isinstance(gamma, Tensor)
    return Normal(beta.detach().double(), gamma.detach().double().abs())


def _same_layer(a: fx.GraphModule, b: fx.GraphModule, name: str) -> bool:
    one, other = (dict(g.get_submodule(name).named_parameters()) for g in (a, b))
    return one.keys() == other.keys() and all(torch.allclose(p, other[n]) for n, p in one.items())


def known_means(reference: fx.GraphModule, given: Mapping[str, Normal]) -> dict[fx.Node, Normal | None]:
    """The mean of every value by channel (axis 1), as far as it follows; None for the rest.

    Args:
        reference: the network, batch norms folded.
        given: the outputs of some layers.
    """
    found: dict[fx.Node, Normal | None] = {}
    for node in reference.graph.nodes:
        name = node.meta.get("layer")
        sources = [found[source] for source in tensor_inputs(node)]
        known = [source for source in sources if source is not None]
        if name in given:
            found[node] = given[name]
        elif known and len(known) == len(sources):
            found[node] = _behind(node, reference, known)
        else:
            found[node] = None
    return found


def _behind(node: fx.Node, reference: fx.GraphModule, sources: list[Normal]) -> Normal | None:
    """What an operation makes of known values."""
    op, first = node.meta["op"], sources[0]
    shapes = [tuple(source.meta["value"].shape) for source in tensor_inputs(node)]
    shape = getattr(node.meta["value"], "shape", None)
    if shape is None:
        return None
    if op in LIMITS:
        return None if first.std is None else Normal(clipped_normal_mean(first.mean, first.std, *LIMITS[op]))
    if op == "add" and len(sources) > 1 and set(shapes) == {tuple(shape)}:
        return Normal(torch.stack([source.mean for source in sources]).sum(0))
    if op == "cat" and shape[1] == sum(s[1] for s in shapes):
        return Normal(torch.cat([source.mean for source in sources]))
    if op in AVERAGES and tuple(shape[:2]) == shapes[0][:2] and _is_plain(node, reference):
        return Normal(first.mean)
    if op in ops.KEEPS_GRID:
        return first
    if op in SHAPES and len(shape) == 2:  # (N, C, ...) to (N, C * positions)
        return Normal(first.mean.repeat_interleave(shape[1] // len(first.mean)))
    return None


def _is_plain(node: fx.Node, reference: fx.GraphModule) -> bool:
    """Whether an average has no border that counts as zeros."""
    padding = getattr(reference.get_submodule(node.meta["layer"]), "padding", 0)
    return (
        padding in (0, (0, 0))
        and "padding" not in node.kwargs
        and (node.meta["op"] != "avg_pool2d" or len(node.args) < 4)
    )
