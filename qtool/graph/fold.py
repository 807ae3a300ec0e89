"""Batch norm into the convolution or linear layer in front of it.

A pair is folded when the batch norm's only producer is the layer and the layer's only consumer is
the batch norm, by the edges of the graph. The outputs stay equal up to about 1e-6 relative.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.graph import ops
from qtool.graph.neighbours import readers
from qtool.graph.trace import copy_graph, layers, tensor_inputs
from qtool.observers.stats import LayerStats, ModelStats


def fold_weights(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights and bias that do the work of a layer followed by a batch norm.

    Args:
        weight: (C, ...), output channels first.
        bias: (C,), or None for zeros.
        mean, var: (C,), the batch norm's running statistics.
        eps: added to var.
        gamma, beta: (C,), scale and shift; None for 1 and 0.

    Returns:
        weight * gamma / sqrt(var + eps), and beta - gamma * (mean - bias) / sqrt(var + eps).

    Example:
        >>> one = torch.ones(1)
        >>> w, b = fold_weights(2 * one.reshape(1, 1), None, mean=one, var=4 * one, eps=0.0, gamma=3 * one)
        >>> w.item(), b.item()
        (3.0, -1.5)
    """
    factor = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        factor = factor * gamma.double()
    shifted = mean.double() - (0.0 if bias is None else bias.double())
    new_bias = (0.0 if beta is None else beta.double()) - factor * shifted
    new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.dim() - 1))
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


@dataclass(frozen=True)
class Folded:
    """A network without the batch norms that could be folded, and which those were.

    Args:
        traced: the network; layers that took in a batch norm have weights of their own.
        pairs: name of each folded batch norm -> name of the layer that took it in.
    """

    traced: fx.GraphModule
    pairs: dict[str, str]


def fold_batch_norms(traced: fx.GraphModule) -> Folded:
    """Fold every batch norm that directly follows a convolution, transposed convolution or linear layer."""
    folded = copy_graph(traced)
    pairs: dict[str, str] = {}
    modules = {name: module for name, _, module in layers(folded)}
    for name, node, module in list(layers(folded)):
        if ops.module_op(module) != "batch_norm" or getattr(module, "running_mean", None) is None:
            continue
        producer = tensor_inputs(node)[0]
        layer_name = producer.meta.get("layer")
        if layer_name is None or not _can_fold(modules[layer_name], producer):
            continue
        if producer.meta.get("guard") != node.meta.get("guard"):
            continue  # statistics of the batch norm are those of one branch only
        modules[layer_name] = _fold(modules[layer_name], module)
        folded.set_submodule(layer_name, modules[layer_name])
        node.replace_all_uses_with(producer)
        folded.graph.erase_node(node)
        pairs[name] = layer_name
    folded.delete_all_unused_submodules()
    folded.recompile()
    return Folded(folded, pairs)


def _can_fold(layer: nn.Module, node: fx.Node) -> bool:
    op = ops.module_op(layer)
    if op == "linear" and node.meta["value"].dim() != 2:
        return False  # channels are last there, and on axis 1 for the batch norm
    return op in ("conv", "conv_transpose", "linear") and len(readers(node)) == 1


def _fold(layer: nn.Module, norm: Any) -> nn.Module:
    """A copy of layer that includes norm."""
    merged: Any = copy.copy(layer)
    merged._parameters = dict(layer._parameters)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    weight, bias = fold_weights(output_channels_first(layer), merged.bias, *statistics)
    merged.weight = nn.Parameter(restore_layout(weight, layer), requires_grad=False)
    merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged  # type: ignore[no-any-return]


def output_channels_first(layer: nn.Module) -> Tensor:
    """A layer's weight with axis 0 the output channels: (C_out, ...).

    A transposed convolution keeps (C_in, C_out / groups, ...), output channel g * (C_out / groups) + j
    at index j of group g's rows.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return swap_channels(weight, _groups(layer)) if ops.module_op(layer) == "conv_transpose" else weight


def restore_layout(weight: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of output_channels_first, for a tensor in that layout."""
    return (
        swap_channels(weight, _groups(layer)).contiguous()
        if ops.module_op(layer) == "conv_transpose"
        else weight
    )


def _groups(layer: nn.Module) -> int:
    assert isinstance(layer.groups, int)
    return layer.groups


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """(G * A, B, ...) to (G * B, A, ...), within each of G groups; its own inverse."""
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])  # (G, A, B, ...)
    return grouped.transpose(1, 2).flatten(0, 1)


def move_stats(stats: ModelStats, pairs: dict[str, str]) -> ModelStats:
    """Statistics for the folded network: a layer's output is now its batch norm's.

    Statistics that were measured on a folded network have no entries of the batch norms, and stay.
    """
    moved = dict(stats.layers)
    for norm, layer in pairs.items():
        if norm in moved and layer in moved:
            moved[layer] = LayerStats(moved[layer].inputs, moved.pop(norm).output)
    return ModelStats(moved, stats.source)
