"""What of a plan follows from the grids of other layers: the flow of grids, and accumulators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from qtool.graph import ops
from qtool.graph.capped import limit_of
from qtool.graph.trace import tensor_inputs
from qtool.numerics.affine import along_axis, approximate_multiplier
from qtool.numerics.spec import QParams
from qtool.quantizers.grids import exact_ratio
from qtool.quantizers.plan.records import EMBEDDING, FAKE, IDENTITY, INTEGER, LayerPlan
from qtool.quantizers.weights import accumulator_bits, quantize_bias, weight_integers

# An error that does not show, as a share of a bias.
LITTLE = 1e-3
NodeGrids = Mapping[fx.Node, QParams | None]


def grid_of_value(node: fx.Node, plan: LayerPlan | None, before: NodeGrids) -> QParams | None:
    """The grid of what a node gives, None for float.

    Args:
        node: of the folded network.
        plan: of the layer that it is, None if it is none.
        before: the grids of what it reads.
    """
    if plan is None or plan.kind == IDENTITY:
        # A value that was not computed: only the likes of dropout hand its grid on.
        sources = tensor_inputs(node)
        hands_on = plan is not None or node.meta["op"] in ops.KEEPS_GRID
        return before[sources[0]] if hands_on and sources else None
    return plan.output if plan.kind in (INTEGER, FAKE, EMBEDDING) else None


def value_grids(traced: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> dict[fx.Node, QParams | None]:
    """The grid of every value of a planned network, None for float."""
    grids: dict[fx.Node, QParams | None] = {}
    for node in traced.graph.nodes:
        name = node.meta.get("layer")
        grids[node] = grid_of_value(node, None if name is None else plans[name], grids)
    return grids


def hands_on_grid(grids: NodeGrids, plans: Mapping[str, LayerPlan]) -> frozenset[str]:
    """The layers whose output is on the very grid that they read, as a max pool's can be, by name.

    Args:
        grids: from value_grids.
        plans: of the same network.
    """
    found = set()
    for node, grid in grids.items():
        name = node.meta.get("layer")
        if grid is not None and name is not None and plans[name].kind == FAKE:
            found |= {name for source in tensor_inputs(node)[:1] if grids[source] is grid}
    return frozenset(found)


def grids_read(node: fx.Node, plan: LayerPlan, grids: NodeGrids) -> list[QParams | None]:
    """The grid on which a layer reads each of its tensor inputs, None for float."""
    fresh = plan.inputs or (None,) * len(tensor_inputs(node))
    return [own or grids[source] for own, source in zip(fresh, tensor_inputs(node), strict=True)]


def with_accumulator(plan: LayerPlan, grid: QParams, bias: Tensor | None) -> LayerPlan:
    """The plan of a layer with an integer weight, for an input on a grid.

    Args:
        plan: its weight, weight_q, accum_bits and scale_approx_bits are used.
        grid: of the input.
        bias: (C,), float, or None.

    Returns:
        The plan with bias_q, accum_scale and note.
    """
    assert plan.weight is not None and plan.weight_q is not None
    steps_per_unit = 1 / (grid.scale.double() * plan.weight.scale.double())
    if plan.scale_approx_bits is not None:
        steps_per_unit = approximate_multiplier(exact_ratio(steps_per_unit), plan.scale_approx_bits)
    bias_q = None if bias is None else quantize_bias(bias, steps_per_unit, plan.accum_bits)
    needed = accumulator_bits(grid, plan.weight, plan.weight_q, bias_q)
    return replace(
        plan,
        bias_q=bias_q,
        accum_scale=1 / steps_per_unit,
        note=f"its sums can need {needed} bits" if needed > plan.accum_bits else "",
    )


def saturates(plan: LayerPlan, bias: Tensor) -> Tensor:
    """Whether each channel's bias, (C,), is beyond the ends of the layer's accumulator; (C,) bool."""
    if plan.accum_scale is None:
        return torch.zeros(len(bias), dtype=torch.bool)  # on a grid of its own, wide enough for all
    return (bias / plan.accum_scale).abs() > 2.0 ** (plan.accum_bits - 1) - 1


def with_room(plan: LayerPlan, grid: QParams, bias: Tensor | None, module: nn.Module) -> LayerPlan:
    """The plan with wider steps for channels whose bias overflows the accumulator, where that is free.

    A channel with weights of about zero has steps so short that a 32-bit bias saturates, and is lost. Its
    weights round to zero on wider ones, which changes its output by less than a share LITTLE of the bias.

    Args:
        plan: of a layer with an integer weight, from with_accumulator.
        grid: of the input.
        bias: (C,), float, or None: the one that is to fit.
        module: the float layer.

    Returns:
        The same plan where all biases fit, or where wider steps would show; all other channels keep theirs.
        Its bias_q and accum_scale follow, for the bias that is given.
    """
    if bias is None or plan.scale_approx_bits is not None:
        return plan
    assert plan.weight is not None and plan.weight_q is not None
    lacking = saturates(plan, bias)
    if plan.weight.spec.axis is None or not bool(lacking.any()):
        return plan
    z = float(grid.zero_point)
    largest_input = max(abs(grid.spec.quant_min - z), abs(grid.spec.quant_max - z))
    # Half of the accumulator for the bias, so that the sums fit too.
    steps = 2.0 ** (plan.accum_bits - 2)
    # How far rounding to wider steps can move an output, as a share of the bias.
    if plan.weight_q[0].numel() * largest_input / 2 / steps > LITTLE:
        return plan
    wider = (bias.double().abs() / steps / grid.scale.double()).float()
    weight = replace(plan.weight, scale=torch.where(lacking, wider, plan.weight.scale))
    rows = along_axis(lacking, 0, plan.weight_q.dim())
    weight_q = torch.where(rows, weight_integers(module, weight), plan.weight_q)
    return with_accumulator(replace(plan, weight=weight, weight_q=weight_q), grid, bias)


def with_limit(plan: LayerPlan, activation: nn.Module) -> LayerPlan:
    """The plan with the limits of the ReLU6 that its layer computes, if each channel has its own.

    Args:
        plan: of a layer.
        activation: the layer, or the activation that it takes over.
    """
    limit = None if plan.kind == IDENTITY else limit_of(activation)
    return plan if limit is None else replace(plan, activation_limit=limit.clone())


def product_scale(grids: Sequence[QParams | None], approx_bits: int | None) -> Tensor:
    """Units of a product of values on grids, per step of its accumulator; (), float64.

    Args:
        grids: of the values.
        approx_bits: of the multiplier that replaces the scale, None leaves it exact.
    """
    scale = torch.tensor(1.0, dtype=torch.float64)
    for grid in grids:
        assert grid is not None
        scale = scale * grid.scale.double()
    if approx_bits is not None:
        scale = 1 / approximate_multiplier(exact_ratio(1 / scale), approx_bits)
    return scale
