"""Decide how a network is quantized in dynamic mode: specs -> LayerPlans without grids of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx, nn

from qtool.graph import ops
from qtool.graph.fold import output_channels_first
from qtool.graph.neighbours import FUSIBLE, fused_activations
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import InputSpec, LayerSpec, QuantSpec
from qtool.quantizers.plan.asked import asked_of_inputs, asked_of_output, find_never_negative
from qtool.quantizers.plan.derived import with_limit
from qtool.quantizers.plan.kinds import WEIGHTED, beyond_float32, layer_kind
from qtool.quantizers.plan.records import (
    CAST,
    DYNAMIC,
    DYNAMIC_FAKE,
    EMBEDDING,
    FAKE,
    FLOAT,
    IDENTITY,
    INTEGER,
    WEIGHTS_ONLY,
    DynamicSpec,
    LayerPlan,
)
from qtool.quantizers.weights import bias_on_own_grid, fake_quantize_bias, quantize_weight

STAYS = "sums, products and concatenations stay in float in dynamic mode"
# Operations that have no dynamic form on integers.
FLOAT_OPS = frozenset({"add", "mul", "cat"})


def plan_dynamic(traced: fx.GraphModule, specs: Mapping[str, LayerSpec]) -> dict[str, LayerPlan]:
    """Decide what becomes of every layer of a network whose batch norms are folded.

    Args:
        traced: the network.
        specs: what is asked, by layer name; a layer without one stays in float.

    Raises:
        ConfigError: if a setting cannot be honoured for a layer.
    """
    return _DynamicPlanner(traced, specs).run()


class _DynamicPlanner:
    """Walks the layers in the order of execution; grids holds what is asked of every value so far."""

    def __init__(self, traced: fx.GraphModule, specs: Mapping[str, LayerSpec]) -> None:
        self.traced = traced
        self.specs = specs
        kinds = {n: _kind(node, specs.get(n), False)[0] for n, node, _ in layers(traced)}
        quantized = {n for n, kind in kinds.items() if kind in (DYNAMIC, DYNAMIC_FAKE)}
        self.fused = fused_activations(traced, quantized)
        self.away = {activation for activation, _ in self.fused.values()}
        self.never_negative = find_never_negative(traced, specs, quantized, self.fused)
        self.grids: dict[fx.Node, QuantSpec | None] = {}

    def run(self) -> dict[str, LayerPlan]:
        modules = {name: module for name, _, module in layers(self.traced)}
        found: dict[str, LayerPlan] = {}
        for node in self.traced.graph.nodes:
            sources = tensor_inputs(node)
            name = node.meta.get("layer")
            if name is None:
                keeps = node.meta["op"] in ops.KEEPS_GRID and bool(sources)
                self.grids[node] = self.grids[sources[0]] if keeps else None
                continue
            computed = self.fused[name][0] if name in self.fused else name
            layer = found[name] = with_limit(self._plan(name, node, modules[name]), modules[computed])
            kept = layer.kind == IDENTITY
            self.grids[node] = self.grids[sources[0]] if kept else _grid_of_result(layer)
        return found

    def _plan(self, name: str, node: fx.Node, module: nn.Module) -> LayerPlan:
        spec = self.specs.get(name)
        kind, note = _kind(node, spec, name in self.away)
        layer = LayerPlan(kind, node.meta["op"], note=note)
        if spec is None or kind in (FLOAT, IDENTITY):
            return layer
        layer = _with_weight(replace(layer, float_bits=spec.float_bits), name, module, spec)
        return self._with_grids(layer, name, node, spec)

    def _with_grids(self, layer: LayerPlan, name: str, node: fx.Node, spec: LayerSpec) -> LayerPlan:
        """The plan with what is asked of the grids that are found at run time."""
        activation = self.fused[name][1] if name in self.fused else "relu" if spec.clip.half_range else None
        if layer.kind == WEIGHTS_ONLY:
            return replace(layer, activation=activation)
        if layer.kind not in (DYNAMIC, DYNAMIC_FAKE) or spec.output is None:
            return layer
        sources = [self.grids[source] for source in tensor_inputs(node)]
        inputs = self._inputs(layer, name, node, spec, sources)
        half_range = spec.clip.half_range or activation is not None or layer.op in FUSIBLE
        output = asked_of_output(node, spec, self.never_negative)
        clip = replace(spec.clip, half_range=half_range)
        grids = [grid or (one and one.grid) for grid, one in zip(sources, inputs, strict=True)]
        wide = spec.weight is not None and any(g and beyond_float32(g, spec.weight) for g in grids)
        return replace(
            layer,
            dynamic=DynamicSpec(output, clip, inputs, activation),
            accum_bits=spec.accum_bits,
            accum_float64=spec.accum_float64 or wide,
            scale_approx_bits=spec.scale_approx_bits,
            everywhere_bits=spec.everywhere_bits,
        )

    def _inputs(
        self,
        layer: LayerPlan,
        name: str,
        node: fx.Node,
        spec: LayerSpec,
        sources: Sequence[QuantSpec | None],
    ) -> tuple[InputSpec | None, ...]:
        """What is asked of each input that arrives in float."""
        fake = layer.kind == DYNAMIC_FAKE
        # As in static mode: a convolution whose weights stay in float takes its inputs as they come.
        if fake and ((layer.op in WEIGHTED and spec.float_bits is None) or not spec.quantize_inputs):
            return (None,) * len(sources)
        on_grid = [grid is not None for grid in sources]
        inputs = asked_of_inputs(name, node, spec, on_grid, self.never_negative)
        if not fake:
            return inputs
        # So do parameters, such as those of a layer norm.
        fed = [source.op != "get_attr" for source in tensor_inputs(node)]
        return tuple(one if is_fed else None for one, is_fed in zip(inputs, fed, strict=True))


def _kind(node: fx.Node, spec: LayerSpec | None, fused_away: bool) -> tuple[str, str]:
    kind, note = layer_kind(node, spec, fused_away)
    if kind in (INTEGER, FAKE) and node.meta["op"] in FLOAT_OPS:
        return FLOAT, STAYS
    return {INTEGER: DYNAMIC, FAKE: DYNAMIC_FAKE}.get(kind, kind), note


def _grid_of_result(layer: LayerPlan) -> QuantSpec | None:
    if layer.dynamic is not None:
        return layer.dynamic.output
    return None if layer.output is None else layer.output.spec


def _with_weight(layer: LayerPlan, name: str, module: nn.Module, spec: LayerSpec) -> LayerPlan:
    """The plan with the integers of the layer's weight and bias, if it is to have any."""
    embedding = layer.kind == EMBEDDING
    has_weight = embedding or layer.op in WEIGHTED
    if not has_weight or spec.weight is None or layer.kind in (DYNAMIC_FAKE, CAST):
        return layer
    grid = replace(spec.weight, axis=None) if embedding else spec.weight
    weight, weight_q = quantize_weight(name, module, grid, spec)
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
    if layer.kind == WEIGHTS_ONLY:
        return replace(layer, bias=fake_quantize_bias(bias, spec.accum_bits))
    scale, bias_q = bias_on_own_grid(bias, spec.accum_bits)
    return replace(layer, bias_scale=scale, bias_q=bias_q)
