"""Dynamic quantization: the ranges of activations are those of each batch that passes.

Convolutions, linear layers and matrix products run on integers; the other operations compute in
float and put their output on a grid of its own; sums, products and concatenations stay in float. A
layer's output carries its scale with it, and the next layer takes the integers as they are. With
the whole batch in one range, a sample's result depends on its neighbours; QuantizedModel can run
sample by sample instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qtool.errors import ModelError
from qtool.graph import ops
from qtool.graph.trace import layers
from qtool.numerics.affine import along_axis, approximate_multiplier, qparams_from_range, quantize_centered
from qtool.numerics.clipping import range_of_tensor
from qtool.numerics.spec import InputSpec, QParams
from qtool.quantizers import plan as plans
from qtool.quantizers.grids import clamp_accumulator, exact_ratio
from qtool.quantizers.limits import OutputClamp, activated
from qtool.quantizers.modules import Cast
from qtool.quantizers.plan import DYNAMIC_FAKE, LayerPlan
from qtool.quantizers.weighted import weighted_function
from qtool.quantizers.weights import (
    weight_centered,
)

Builders = Mapping[str, Callable[[nn.Module, LayerPlan], nn.Module]]


class OnGrid(NamedTuple):
    """A tensor on a grid that was found at run time."""

    centered: Tensor
    """x_q - zero_point, any shape"""
    scale: Tensor
    """units of x per integer step, shape ()"""


def live_grid(x: Tensor, asked: InputSpec, scale_approx_bits: int | None = None) -> QParams:
    """The grid that a tensor's own range asks for.

    Raises:
        ModelError: if it has none.
    """
    try:
        x_min, x_max = range_of_tensor(x, asked.grid, asked.clip)
        x_min, x_max = x_min.to(x.device), x_max.to(x.device)  # clip modes compute on the CPU
        return qparams_from_range(x_min, x_max, asked.grid, scale_approx_bits)
    except ValueError as error:  # NaN, infinity, or no values at all
        raise ModelError(f"dynamic mode: activations have no range: {error}") from error


def put_on_grid(x: Tensor, asked: InputSpec, scale_approx_bits: int | None = None) -> OnGrid:
    """A float tensor on a grid of its own."""
    qparams = live_grid(x, asked, scale_approx_bits)
    return OnGrid(quantize_centered(x, qparams), qparams.scale)


def to_float(value: Any) -> Any:
    """Float tensors for those on a grid, in a nest of tuples, lists and dicts."""
    if isinstance(value, OnGrid):
        return value.centered * value.scale
    if isinstance(value, (tuple, list)):
        return type(value)(to_float(v) for v in value)
    return {k: to_float(v) for k, v in value.items()} if isinstance(value, dict) else value


class _DynamicLayer(nn.Module):
    """What the dynamic layers share: inputs onto grids, the output from an accumulator."""

    limit: Tensor | None

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        assert plan.dynamic is not None
        self.asked = plan.dynamic
        self.accum_bits = plan.accum_bits
        self.approx_bits = plan.scale_approx_bits
        self.everywhere_bits = plan.everywhere_bits
        self.register_buffer("limit", plan.activation_limit, persistent=False)

    def take(self, x: Tensor | OnGrid, index: int) -> OnGrid:
        """Input number index on a grid: its own, or one found now."""
        if isinstance(x, OnGrid):
            return x
        asked = self.asked.inputs[index]
        assert asked is not None
        return put_on_grid(x, asked, self.approx_bits)

    def give(self, x: Tensor) -> OnGrid:
        """A float result through the activation and onto a grid."""
        x = x if self.asked.activation is None else activated(x, self.asked.activation, self.limit)
        return put_on_grid(x, InputSpec(self.asked.output, self.asked.clip), self.approx_bits)

    def requantize(self, accumulator: Tensor, scale: Tensor) -> OnGrid:
        """An accumulator, with its units per step, through the activation and onto a grid."""
        x = (accumulator * scale).float()
        if self.approx_bits is None:
            return self.give(x)
        x = activated(x, self.asked.activation, self.limit)
        grid = live_grid(x, InputSpec(self.asked.output, self.asked.clip), self.approx_bits)
        ratio = approximate_multiplier(
            exact_ratio(scale.double() / grid.scale.double()), self.approx_bits
        ).float()
        clamp = OutputClamp(grid, self.asked.activation, self.limit)
        return OnGrid(clamp.apply_((accumulator.float() * ratio).round_()), grid.scale)


def _approximated(accum_scale: Tensor, num_bits: int) -> Tensor:
    """A scale, float32, whose reciprocal is an integer of num_bits and a shift."""
    steps_per_unit = approximate_multiplier(exact_ratio(1 / accum_scale.double()), num_bits)
    return (1 / steps_per_unit).float()


class DynamicWeighted(_DynamicLayer):
    """A convolution, transposed convolution or linear layer on integers."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    bias_scale: Tensor

    def __init__(self, layer: nn.Module, plan: LayerPlan) -> None:
        super().__init__(plan)
        assert plan.weight is not None and plan.weight_q is not None
        self.compute = weighted_function(layer)
        self.channels_last = isinstance(layer, nn.Linear)
        dtype = torch.float64 if plan.accum_float64 else torch.float32
        weight = weight_centered(plan.weight, plan.weight_q, layer).to(dtype)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("weight_scale", plan.weight.scale.clone(), persistent=False)
        self.register_buffer("bias", plan.bias_q, persistent=False)
        self.register_buffer("bias_scale", plan.bias_scale, persistent=False)

    def forward(self, x: Tensor | OnGrid) -> OnGrid:
        taken = self.take(x, 0)
        accumulator = self.compute(taken.centered.to(self.weight.dtype), self.weight).round_()
        axis, dims = (-1 if self.channels_last else 1), accumulator.dim()
        scale = taken.scale * self.weight_scale
        if self.approx_bits is not None:
            scale = _approximated(scale, self.approx_bits)
        if self.bias is not None:
            accumulator += along_axis(self._bias_at(scale), axis, dims)
        accumulator = clamp_accumulator(accumulator, self.accum_bits)
        return self.requantize(accumulator, along_axis(scale, axis, dims))

    def _bias_at(self, scale: Tensor) -> Tensor:
        """The bias, (C,), in steps of an accumulator whose scale is () or (C,)."""
        assert self.bias is not None
        ratio = exact_ratio(self.bias_scale / scale.double())
        if self.approx_bits is not None:
            ratio = approximate_multiplier(ratio, self.approx_bits)
        bias = clamp_accumulator(torch.round(self.bias * ratio), self.accum_bits)
        return bias.to(self.weight.dtype)


class DynamicMatmul(_DynamicLayer):
    """A product of two matrices, or batches of them, on integers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], plan: LayerPlan) -> None:
        super().__init__(plan)
        self.function = function

    def forward(self, a: Tensor | OnGrid, b: Tensor | OnGrid) -> OnGrid:
        first, second = self.take(a, 0), self.take(b, 1)
        accumulator = self.function(first.centered, second.centered).round_()
        accumulator = clamp_accumulator(accumulator, max(self.accum_bits, plans.OP_ACCUM_BITS))
        scale = first.scale * second.scale
        if self.everywhere_bits is not None:
            scale = _approximated(scale, self.everywhere_bits)
        return self.requantize(accumulator, scale)


class DynamicFake(_DynamicLayer):
    """A float operation whose output is put on a grid; fresh inputs are put on one first."""

    def __init__(self, operation: nn.Module, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.operation = operation if plan.float_bits is None else Cast(operation, plan.float_bits)

    def forward(self, *args: Any, **kwargs: Any) -> OnGrid:
        count = 0

        def taken(value: Any) -> Any:
            nonlocal count
            if isinstance(value, OnGrid) or ops.is_float_tensor(value):
                as_it_comes = self.asked.inputs[count] is None
                value = value if as_it_comes else self.take(value, count)
                count += 1
                return to_float(value)
            if isinstance(value, (tuple, list)):
                return type(value)(taken(v) for v in value)
            return {k: taken(v) for k, v in value.items()} if isinstance(value, dict) else value

        result: Tensor = self.operation(*taken(args), **taken(kwargs))
        return self.give(result)


class DynamicEmbedding(nn.Module):
    """Rows of an integer table, on the weight's grid."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Module, plan: LayerPlan) -> None:
        super().__init__()
        assert plan.weight is not None and plan.weight_q is not None
        weight = weight_centered(plan.weight, plan.weight_q, layer)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", plan.weight.scale.clone(), persistent=False)

    def forward(self, index: Tensor) -> OnGrid:
        return OnGrid(F.embedding(index, self.weight), self.scale)


class FromGrid(nn.Module):
    """Float values for what is on a grid; anything else passes."""

    def forward(self, x: Any) -> Any:
        return to_float(x)


class DynamicBuilder:
    """Rewrites a graph in place: quantized layers take and give OnGrid, the rest is fed floats."""

    def __init__(
        self, network: fx.GraphModule, layer_plans: Mapping[str, LayerPlan], float_builders: Builders
    ) -> None:
        self.network = network
        self.plans = layer_plans
        self.float_builders = float_builders
        self.on_grid: set[fx.Node] = set()
        self.floats: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Replace every layer by what its plan says."""
        modules = {name: module for name, _, module in layers(self.network)}
        for node in list(self.network.graph.nodes):
            name = node.meta.get("layer")
            plan = None if name is None else self.plans[name]
            if (plan is not None and plan.kind == plans.IDENTITY) or node.meta["op"] in ops.KEEPS_GRID:
                node.replace_all_uses_with(node.all_input_nodes[0])
                self.network.graph.erase_node(node)
            elif plan is None or plan.kind in self.float_builders:
                self._feed_floats(node)
                if plan is not None and name is not None:
                    self.network.set_submodule(name, self.float_builders[plan.kind](modules[name], plan))
            elif name is not None:
                self.network.set_submodule(name, _build(modules[name], plan))
                self.on_grid.add(node)

    def _feed_floats(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in self.on_grid:
                continue
            if source not in self.floats:
                name = f"{source.meta['layer']}_dequantize"
                self.network.add_submodule(name, FromGrid())
                with self.network.graph.inserting_after(source):
                    self.floats[source] = self.network.graph.call_module(name, (source,))
                self.floats[source].meta.update(op="dequantize", value=source.meta["value"])
            node.replace_input_with(source, self.floats[source])


def _build(module: nn.Module, plan: LayerPlan) -> nn.Module:
    if plan.kind == plans.EMBEDDING:
        return DynamicEmbedding(module, plan)
    if plan.kind == DYNAMIC_FAKE:
        return DynamicFake(module, plan)
    if plan.op in plans.WEIGHTED:
        return DynamicWeighted(module, plan)
    function: Any = torch.matmul if plan.op == "matmul" else module.function
    return DynamicMatmul(function, plan)
