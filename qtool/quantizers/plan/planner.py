"""Decide, layer by layer, how a network is quantized: specs and statistics -> LayerPlans.

Nothing is computed on activations here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, fx, nn

from qtool.graph.fold import output_channels_first
from qtool.graph.neighbours import edit_stats, fused_activations
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import LayerSpec, QParams
from qtool.observers.stats import ModelStats
from qtool.quantizers.plan.asked import asked_of_inputs, find_never_negative
from qtool.quantizers.plan.derived import (
    grid_of_value,
    product_scale,
    with_accumulator,
    with_limit,
    with_room,
)
from qtool.quantizers.plan.grids import Grids
from qtool.quantizers.plan.kinds import WEIGHTED, beyond_float32, layer_kind, quantizes_output
from qtool.quantizers.plan.records import (
    CAST,
    EMBEDDING,
    FAKE,
    FLOAT,
    IDENTITY,
    INTEGER,
    UNREACHED,
    WEIGHTS_ONLY,
    LayerPlan,
    ModelPlan,
)
from qtool.quantizers.weights import (
    fake_quantize_bias,
    quantize_weight,
    weight_grid,
)

# The grid and the integers of each weight, by layer.
Weights = Mapping[str, tuple[QParams, Tensor]]
NO_WEIGHTS: Weights = MappingProxyType({})
# Accumulators of operations other than convolutions and linear layers are never narrower.
OP_ACCUM_BITS = 32


def plan_model(
    traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec], weights: Weights = NO_WEIGHTS
) -> ModelPlan:
    """Decide what becomes of every layer of a network whose batch norms are folded.

    Args:
        traced: from trace and fold_batch_norms.
        stats: of the same network, moved along with the folding.
        specs: what is asked, by layer name; a layer without one stays in float.
        weights: those that are known already, from quantized_weights for the same specs.

    Raises:
        StatsError: if a record or field that is needed is missing.
        ConfigError: if a setting cannot be honoured for a layer.
    """
    return _Planner(traced, stats, specs, weights).run()


def quantized_weights(
    traced: fx.GraphModule, specs: Mapping[str, LayerSpec]
) -> dict[str, tuple[QParams, Tensor]]:
    """The grids and integers of all weights that specs ask for, by layer; embeddings are left out.

    They depend on nothing else, so that many plans can share them.
    """
    found = {}
    for name, node, module in layers(traced):
        spec = specs.get(name)
        if spec is not None and spec.weight is not None and node.meta["op"] in WEIGHTED:
            found[name] = quantize_weight(name, module, spec.weight, spec)
    return found


def output_ranges(
    traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec]
) -> dict[str, tuple[float, float]]:
    """The (min, max) that each output on a grid is given, by layer; arguments as for plan_model."""
    planner = _Planner(traced, stats, specs)
    found = {}
    for name, node, _ in layers(traced):
        spec = planner.specs.get(name)
        if spec is not None and quantizes_output(node, spec) and name not in planner.identities:
            x_min, x_max = planner.chosen.output_range(name, node, spec)
            found[name] = (float(x_min), float(x_max))
    return found


def chosen_grids(
    traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec], names: Collection[str]
) -> tuple[dict[str, QParams], dict[str, QParams]]:
    """The grids that plan_model gives the weights, and the outputs, of some layers, by layer.

    Args:
        traced, stats, specs: as for plan_model.
        names: of the layers; embeddings are left out.
    """
    planner = _Planner(traced, stats, specs)
    weights, outputs = {}, {}
    for name, node, module in layers(traced):
        if name not in names or name not in specs:
            continue
        spec = specs[name]
        kind, _ = layer_kind(node, spec, name in planner.identities)
        if kind in (INTEGER, WEIGHTS_ONLY) and node.meta["op"] in WEIGHTED:
            assert spec.weight is not None
            weights[name] = weight_grid(name, module, spec.weight, spec)
        if kind in (INTEGER, FAKE):
            outputs[name] = planner.chosen.of_output(name, node, spec)
    return weights, outputs


class _Planner:
    """Walks the layers in the order of execution; grids holds the grid of every value so far."""

    def __init__(
        self,
        traced: fx.GraphModule,
        stats: ModelStats,
        specs: Mapping[str, LayerSpec],
        weights: Weights = NO_WEIGHTS,
    ) -> None:
        self.traced = traced
        self.weights = weights
        self.unreached = {
            n for n, node, _ in layers(traced) if "guard" in node.meta and n not in stats.layers
        }
        needs_stats = {n for n in self.unreached & specs.keys() if specs[n].output is not None}
        self.specs = {name: spec for name, spec in specs.items() if name not in needs_stats}
        specs = self.specs
        quantized = {n for n, node, _ in layers(traced) if quantizes_output(node, specs.get(n))}
        self.fused = fused_activations(traced, quantized)
        self.identities = {activation for activation, _ in self.fused.values()}
        self.identities |= {n for n, node, _ in layers(traced) if self._is_left_out(n, node)}
        # A layer that becomes part of the one in front of it gives that one's values.
        self.stats = edit_stats(traced, stats, quantized)
        self.never_negative = find_never_negative(traced, specs, quantized, self.fused)
        self.chosen = Grids(self.stats, self.fused, self.never_negative)
        self.grids: dict[fx.Node, QParams | None] = {}
        self.plans: dict[str, LayerPlan] = {}

    def run(self) -> ModelPlan:
        modules = {name: module for name, _, module in layers(self.traced)}
        for node in self.traced.graph.nodes:
            name = node.meta.get("layer")
            plan = None if name is None else self._plan(name, node, modules[name])
            if plan is not None:
                computed = self.fused[name][0] if name in self.fused else name
                plan = with_limit(plan, modules[computed])
                self.plans[name] = plan
            self.grids[node] = grid_of_value(node, plan, self.grids)
        return ModelPlan(self.plans, self.stats)

    def _is_left_out(self, name: str, node: fx.Node) -> bool:
        return layer_kind(node, self.specs.get(name), fused_away=False)[0] == IDENTITY

    def _plan(self, name: str, node: fx.Node, module: nn.Module) -> LayerPlan:
        spec = self.specs.get(name)
        kind, note = layer_kind(node, spec, name in self.identities)
        op: str = node.meta["op"]
        if spec is None or kind in (FLOAT, IDENTITY):
            unreached = spec is None and name in self.unreached and kind == FLOAT
            return LayerPlan(kind, op, note=UNREACHED if unreached else note)
        if kind == CAST:
            return LayerPlan(CAST, op, inputs=(None,) * len(tensor_inputs(node)), float_bits=spec.float_bits)
        if kind == EMBEDDING:
            return self._plan_embedding(name, node, module, spec)
        if kind == WEIGHTS_ONLY:
            return self._plan_weights_only(name, node, module, spec)
        if kind == FAKE:
            return self._plan_fake(name, node, spec, op)
        if op in WEIGHTED:
            return self._plan_weighted(name, node, module, spec)
        return self._plan_integer_op(name, node, spec)

    def _plan_weighted(self, name: str, node: fx.Node, module: nn.Module, spec: LayerSpec) -> LayerPlan:
        assert spec.weight is not None
        fresh = self._fresh_inputs(name, node, spec)
        grid = fresh[0] or self.grids[tensor_inputs(node)[0]]
        assert grid is not None
        weight, weight_q = self._weight(name, module, spec)
        plan = LayerPlan(
            INTEGER,
            node.meta["op"],
            inputs=fresh,
            output=self.chosen.of_output(name, node, spec),
            activation=self._activation(name),
            weight=weight,
            weight_q=weight_q,
            float_weight=output_channels_first(module).clone() if spec.keep_float_weight else None,
            accum_bits=spec.accum_bits,
            accum_float64=spec.accum_float64 or beyond_float32(grid.spec, weight.spec),
            scale_approx_bits=spec.scale_approx_bits,
        )
        bias = getattr(module, "bias", None)
        return with_room(with_accumulator(plan, grid, bias), grid, bias, module)

    def _plan_weights_only(self, name: str, node: fx.Node, module: nn.Module, spec: LayerSpec) -> LayerPlan:
        assert spec.weight is not None
        weight, weight_q = self._weight(name, module, spec)
        bias = getattr(module, "bias", None)
        as_it_comes = (None,) * len(tensor_inputs(node))
        return LayerPlan(
            WEIGHTS_ONLY,
            node.meta["op"],
            inputs=as_it_comes if spec.input is None else self._fresh_inputs(name, node, spec),
            weight=weight,
            weight_q=weight_q,
            activation=self._activation(name),
            float_weight=output_channels_first(module).clone() if spec.keep_float_weight else None,
            bias=None if bias is None else fake_quantize_bias(bias, spec.accum_bits),
        )

    def _plan_embedding(self, name: str, node: fx.Node, module: nn.Module, spec: LayerSpec) -> LayerPlan:
        assert spec.weight is not None
        # Its output is rows of the table: what calibration saw of it says which values matter.
        record = self.stats.layers[name].output if name in self.stats.layers else None
        seen = None if record is None else (record.min, record.max)
        asked = replace(spec, weight_range=seen, weight_clip=None, weight_range_factors=None)
        weight, weight_q = quantize_weight(name, module, replace(spec.weight, axis=None), asked)
        kept = output_channels_first(module).clone() if spec.keep_float_weight else None
        return LayerPlan(
            EMBEDDING, node.meta["op"], output=weight, weight=weight, weight_q=weight_q, float_weight=kept
        )

    def _plan_integer_op(self, name: str, node: fx.Node, spec: LayerSpec) -> LayerPlan:
        fresh = self._fresh_inputs(name, node, spec)
        grids = [f or self.grids[s] for f, s in zip(fresh, tensor_inputs(node), strict=True)]
        return LayerPlan(
            INTEGER,
            node.meta["op"],
            inputs=fresh,
            output=self.chosen.of_output(name, node, spec),
            activation=self._activation(name),
            accum_scale=product_scale(grids, spec.everywhere_bits),
            accum_bits=max(OP_ACCUM_BITS, spec.accum_bits),
            scale_approx_bits=spec.scale_approx_bits,
            everywhere_bits=spec.everywhere_bits,
            sum_once=spec.sum_once and node.meta["op"] == "add",
        )

    def _plan_fake(self, name: str, node: fx.Node, spec: LayerSpec, op: str) -> LayerPlan:
        # A convolution whose weights stay in float takes its inputs as they come.
        takes_as_is = (op in WEIGHTED and spec.float_bits is None) or not spec.quantize_inputs
        sources = tensor_inputs(node)
        inputs = (None,) * len(sources) if takes_as_is else self._fresh_inputs(name, node, spec)
        # So do parameters, such as those of a layer norm.
        inputs = tuple(None if source.op == "get_attr" else inputs[i] for i, source in enumerate(sources))
        handed_on = self.grids[sources[0]] if spec.on_input_grid and spec.output_range is None else None
        return LayerPlan(
            FAKE,
            op,
            inputs=inputs,
            output=handed_on or self.chosen.of_output(name, node, spec),
            activation=self._activation(name),
            float_bits=spec.float_bits,
        )

    def _weight(self, name: str, module: nn.Module, spec: LayerSpec) -> tuple[QParams, Tensor]:
        assert spec.weight is not None
        return self.weights.get(name) or quantize_weight(name, module, spec.weight, spec)

    def _activation(self, name: str) -> str | None:
        if name in self.fused:
            return self.fused[name][1]
        spec = self.specs.get(name)
        # Half range that the user asked for stands for a ReLU, as one in front of it would.
        return "relu" if spec is not None and spec.clip.half_range else None

    def _fresh_inputs(self, name: str, node: fx.Node, spec: LayerSpec) -> tuple[QParams | None, ...]:
        """Grids for the inputs that arrive in float, from this layer's own records of them."""
        on_grid = [self.grids[s] is not None for s in tensor_inputs(node)]
        asked = asked_of_inputs(name, node, spec, on_grid, self.never_negative)
        return tuple(
            None if one is None else self.chosen.of_input(name, index, one, spec)
            for index, one in enumerate(asked)
        )
