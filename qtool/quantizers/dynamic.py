"""Dynamic quantization: the ranges of activations are those of each batch that passes.

Convolutions, linear layers and matrix products run on integers; the other operations compute in
float and put their output on a grid of its own; sums, products and concatenations stay in float. A
layer's output carries its scale with it, and the next layer takes the integers as they are. With
the whole batch in one range, a sample's result depends on its neighbours; QuantizedModel can run
sample by sample instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qtool.errors import ModelError
from qtool.graph import ops
from qtool.graph.fold import output_channels_first
from qtool.graph.neighbours import FUSIBLE, fused_activations
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.affine import along_axis, approximate_multiplier, qparams_from_range, quantize_centered
from qtool.numerics.clipping import range_of_tensor
from qtool.numerics.spec import InputSpec, LayerSpec, QParams, QuantSpec
from qtool.quantizers import plan as plans
from qtool.quantizers.modules import (
    ACTIVATION_LIMITS,
    Cast,
    clamp_accumulator,
    exact_ratio,
    output_limits,
    weighted_function,
)
from qtool.quantizers.plan import DYNAMIC, DYNAMIC_FAKE, DynamicSpec, LayerPlan
from qtool.quantizers.weights import (
    bias_on_own_grid,
    fake_quantize_bias,
    quantize_weight,
    weight_centered,
)

STAYS = "sums, products and concatenations stay in float in dynamic mode"
# Operations that have no dynamic form on integers.
FLOAT_OPS = frozenset({"add", "mul", "cat"})


Builders = Mapping[str, Callable[[nn.Module, LayerPlan], nn.Module]]


class OnGrid(NamedTuple):
    """A tensor on a grid that was found at run time."""

    centered: Tensor
    """x_q - zero_point, any shape"""
    scale: Tensor
    """units of x per integer step, shape ()"""


def plan_dynamic(traced: fx.GraphModule, specs: Mapping[str, LayerSpec]) -> dict[str, LayerPlan]:
    """Decide what becomes of every layer of a network whose batch norms are folded.

    Args:
        traced: the network.
        specs: what is asked, by layer name; a layer without one stays in float.

    Raises:
        ConfigError: if a setting cannot be honoured for a layer.
    """
    modules = {name: module for name, _, module in layers(traced)}
    kinds = {n: _kind(node, specs.get(n), False)[0] for n, node, _ in layers(traced)}
    quantized = {n for n, kind in kinds.items() if kind in (DYNAMIC, DYNAMIC_FAKE)}
    fused = fused_activations(traced, quantized)
    away = {activation for activation, _ in fused.values()}
    found: dict[str, LayerPlan] = {}
    grids: dict[fx.Node, QuantSpec | None] = {}
    for node in traced.graph.nodes:
        sources = tensor_inputs(node)
        name = node.meta.get("layer")
        if name is None:
            grids[node] = grids[sources[0]] if node.meta["op"] in ops.KEEPS_GRID and sources else None
            continue
        spec = specs.get(name)
        kind, note = _kind(node, spec, name in away)
        layer = LayerPlan(kind, node.meta["op"], note=note)
        if spec is not None and kind not in (plans.FLOAT, plans.IDENTITY):
            activation = fused[name][1] if name in fused else "relu" if spec.clip.half_range else None
            layer = _with_weight(replace(layer, float_bits=spec.float_bits), name, modules[name], spec)
            layer = _with_grids(layer, name, node, spec, activation, [grids[s] for s in sources])
        found[name] = layer
        grids[node] = grids[sources[0]] if kind == plans.IDENTITY else _grid_of_result(layer)
    return found


def _kind(node: fx.Node, spec: LayerSpec | None, fused_away: bool) -> tuple[str, str]:
    kind, note = plans.layer_kind(node, spec, fused_away)
    if kind in (plans.INTEGER, plans.FAKE) and node.meta["op"] in FLOAT_OPS:
        return plans.FLOAT, STAYS
    return {plans.INTEGER: DYNAMIC, plans.FAKE: DYNAMIC_FAKE}.get(kind, kind), note


def _grid_of_result(layer: LayerPlan) -> QuantSpec | None:
    if layer.dynamic is not None:
        return layer.dynamic.output
    return None if layer.output is None else layer.output.spec


def _with_weight(layer: LayerPlan, name: str, module: nn.Module, spec: LayerSpec) -> LayerPlan:
    """The plan with the integers of the layer's weight and bias, if it is to have any."""
    embedding = layer.kind == plans.EMBEDDING
    has_weight = embedding or layer.op in plans.WEIGHTED
    if not has_weight or spec.weight is None or layer.kind in (DYNAMIC_FAKE, plans.CAST):
        return layer
    grid = replace(spec.weight, axis=None) if embedding else spec.weight
    given = (spec.weight_range, spec.weight_clip, spec.weight_range_factors)
    weight, weight_q = quantize_weight(name, module, grid, *given)
    layer = replace(
        layer,
        weight=weight,
        weight_q=weight_q,
        float_weight=output_channels_first(module).clone() if spec.keep_float_weight else None,
        output=weight if embedding else None,
    )
    bias = getattr(module, "bias", None)
    if bias is None:
        return layer
    if layer.kind == plans.WEIGHTS_ONLY:
        return replace(layer, bias=fake_quantize_bias(bias, spec.accum_bits))
    scale, bias_q = bias_on_own_grid(bias, spec.accum_bits)
    return replace(layer, bias_scale=scale, bias_q=bias_q)


def _with_grids(
    layer: LayerPlan,
    name: str,
    node: fx.Node,
    spec: LayerSpec,
    activation: str | None,
    sources: Sequence[QuantSpec | None],
) -> LayerPlan:
    """The plan with what is asked of the grids that are found at run time."""
    if layer.kind == plans.WEIGHTS_ONLY:
        return replace(layer, activation=activation)
    if layer.kind not in (DYNAMIC, DYNAMIC_FAKE) or spec.output is None:
        return layer
    fake, op = layer.kind == DYNAMIC_FAKE, layer.op
    # As in static mode: a convolution whose weights stay in float takes its inputs as they come.
    if fake and ((op in plans.WEIGHTED and spec.float_bits is None) or not spec.quantize_inputs):
        inputs: tuple[InputSpec | None, ...] = (None,) * len(sources)
    else:
        inputs = plans.asked_of_inputs(name, node, spec, [grid is not None for grid in sources])
    if fake:  # so do parameters, such as those of a layer norm
        from_net = [source.op != "get_attr" for source in tensor_inputs(node)]
        inputs = tuple(one if is_fed else None for one, is_fed in zip(inputs, from_net, strict=True))
    half_range = spec.clip.half_range or activation is not None or op in FUSIBLE
    asked = DynamicSpec(spec.output, replace(spec.clip, half_range=half_range), inputs, activation)
    grids = [grid or (one and one.grid) for grid, one in zip(sources, inputs, strict=True)]
    wide = spec.weight is not None and any(g and plans.beyond_float32(g, spec.weight) for g in grids)
    return replace(
        layer,
        dynamic=asked,
        accum_bits=spec.accum_bits,
        accum_float64=spec.accum_float64 or wide,
        scale_approx_bits=spec.scale_approx_bits,
    )


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

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        assert plan.dynamic is not None
        self.asked = plan.dynamic
        self.accum_bits = plan.accum_bits
        self.approx_bits = plan.scale_approx_bits

    def take(self, x: Tensor | OnGrid, index: int) -> OnGrid:
        """Input number index on a grid: its own, or one found now."""
        if isinstance(x, OnGrid):
            return x
        asked = self.asked.inputs[index]
        assert asked is not None
        return put_on_grid(x, asked, self.approx_bits)

    def give(self, x: Tensor) -> OnGrid:
        """A float result, which is overwritten, through the activation and onto a grid."""
        low, high = ACTIVATION_LIMITS[self.asked.activation]
        x = x.clamp_(low, high) if self.asked.activation is not None else x
        return put_on_grid(x, InputSpec(self.asked.output, self.asked.clip), self.approx_bits)

    def requantize(self, accumulator: Tensor, scale: Tensor) -> OnGrid:
        """An accumulator, with its units per step, through the activation and onto a grid."""
        x = (accumulator * scale).float()
        if self.approx_bits is None:
            return self.give(x)
        x = x.clamp_(*ACTIVATION_LIMITS[self.asked.activation])
        grid = live_grid(x, InputSpec(self.asked.output, self.asked.clip), self.approx_bits)
        ratio = approximate_multiplier(
            exact_ratio(scale.double() / grid.scale.double()), self.approx_bits
        ).float()
        centered = (accumulator.float() * ratio).round_().clamp_(*output_limits(grid, self.asked.activation))
        return OnGrid(centered, grid.scale)


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
            scale = 1 / approximate_multiplier(1 / scale, self.approx_bits)
        if self.bias is not None:
            accumulator += along_axis(self._bias_at(scale), axis, dims)
        accumulator = clamp_accumulator(accumulator, self.accum_bits)
        return self.requantize(accumulator, along_axis(scale, axis, dims))

    def _bias_at(self, scale: Tensor) -> Tensor:
        """The bias, (C,), in steps of an accumulator whose scale is () or (C,)."""
        assert self.bias is not None
        ratio = self.bias_scale / scale.double()
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
        return self.requantize(accumulator, first.scale * second.scale)


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
        # The operation may have given back a view of its input.
        return self.give(result.clone() if self.asked.activation is not None else result)


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
