"""Decide, layer by layer, how a network is quantized: specs and statistics -> LayerPlans.

A plan is plain data: which kind of quantized module, on which grids, with which integers. It is
what a checkpoint stores, and all that is needed to build the quantized network again. Nothing is
computed on activations here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from qtool.errors import ConfigError, StatsError
from qtool.graph import ops
from qtool.graph.fold import output_channels_first
from qtool.graph.neighbours import FUSIBLE, edit_stats, fused_activations
from qtool.graph.trace import is_mask, layers, tensor_inputs
from qtool.numerics.affine import approximate_multiplier, qparams_from_range
from qtool.numerics.clipping import choose_range
from qtool.numerics.spec import ClipSpec, InputSpec, LayerSpec, QParams, QuantSpec
from qtool.observers.stats import ActivationStats, ModelStats
from qtool.quantizers.modules import exact_ratio
from qtool.quantizers.weights import (
    accumulator_bits,
    fake_quantize_bias,
    quantize_bias,
    quantize_weight,
)

# What can be done with a layer.
INTEGER = "integer"  # computes on integers
FAKE = "fake"  # computes in float, its output is put on a grid
WEIGHTS_ONLY = "weights only"  # weights went through a grid, computes in float
DYNAMIC = "dynamic integer"  # computes on integers, on grids found at run time
DYNAMIC_FAKE = "dynamic fake"  # computes in float, its output is put on a grid found at run time
EMBEDDING = "embedding"  # rows of an integer table
IDENTITY = "identity"  # a ReLU that the layer in front of it computes
FLOAT = "float"  # stays as it was
CAST = "cast"  # runs in a float type of its own

NOT_ASKED = "not asked for"  # the note of a layer that was to stay in float

WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
# Operations that compute on the integers of all their inputs.
INTEGER_OPS = frozenset({"add", "mul", "cat", "matmul", "einsum"})
# Their accumulators are never narrower, whatever is asked for convolutions and linear layers.
OP_ACCUM_BITS = 32


@dataclass(frozen=True)
class DynamicSpec:
    """What is asked of a layer whose activations' grids are found at run time.

    Args:
        output: grid of the output.
        clip: how its range is chosen.
        inputs: grid and clipping of each input that arrives in float; None to leave it so.
        activation: "relu" or "relu6" that the layer computes, or None.
    """

    output: QuantSpec
    clip: ClipSpec
    inputs: tuple[InputSpec | None, ...]
    activation: str | None = None


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Args:
        kind: one of the constants above.
        op: what it computes.
        inputs: for each tensor input, the grid that it is put on when it arrives in float; None
            when it keeps the grid it has, or stays in float.
        output: grid of the output, None for float.
        activation: "relu" or "relu6" computed by this layer's clamp.
        weight: grid of the weight; a per-channel one counts output channels (axis 0).
        weight_q: integers of the weight, output channels first, in the smallest dtype.
        bias_q: (C,) int64, at the accumulator's scale unless there is a bias_scale.
        bias_scale: units of the output per step of bias_q, (), of a layer whose accumulator's scale is
            found at run time.
        bias: (C,) float bias of a weights-only layer, after its own quantization.
        accum_scale: units of the output per accumulator step, () or (C,).
        accum_bits: width of the accumulator.
        accum_float64: whether the simulation accumulates in float64.
        scale_approx_bits: of the requantization ratio.
        dynamic: what is asked of tensors whose grid is found at run time.
        float_bits: width of the float type that the operation runs in, None for float32.
        float_weight: the float weight, output channels first, where it was to be kept.
        note: why the layer is not quantized as asked, in words, or "".
    """

    kind: str
    op: str
    inputs: tuple[QParams | None, ...] = ()
    output: QParams | None = None
    activation: str | None = None
    weight: QParams | None = None
    weight_q: Tensor | None = None
    bias_q: Tensor | None = None
    bias_scale: Tensor | None = None
    bias: Tensor | None = None
    accum_scale: Tensor | None = None
    accum_bits: int = 32
    accum_float64: bool = False
    scale_approx_bits: int | None = None
    dynamic: DynamicSpec | None = None
    float_bits: int | None = None
    float_weight: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelPlan:
    """What becomes of every layer of a network.

    Args:
        layers: by name.
        edited_stats: the statistics it was decided from; None in dynamic mode, or when read back.
        per_sample: whether the network is to run sample by sample.
    """

    layers: Mapping[str, LayerPlan]
    edited_stats: ModelStats | None = None
    per_sample: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether grids of activations are found at run time."""
        return any(layer.dynamic is not None for layer in self.layers.values())


def plan_model(traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec]) -> ModelPlan:
    """Decide what becomes of every layer of a network whose batch norms are folded.

    Args:
        traced: from trace and fold_batch_norms.
        stats: of the same network, moved along with the folding.
        specs: what is asked, by layer name; a layer without one stays in float.

    Raises:
        StatsError: if a record or field that is needed is missing.
        ConfigError: if a setting cannot be honoured for a layer.
    """
    return _Planner(traced, stats, specs).run()


def asked_of_inputs(
    name: str, node: fx.Node, spec: LayerSpec, on_grid: Sequence[bool]
) -> tuple[InputSpec | None, ...]:
    """What is asked of each input that arrives in float; None for one on a grid, and for a mask.

    Args:
        name, node: the layer.
        spec: what is asked of it; it has an output grid.
        on_grid: for each tensor input, whether the layer in front of it has put it on a grid.

    Raises:
        ConfigError: if an input has an entry of its own and no use for it, or needs one and has none.
    """
    assert spec.output is not None
    beyond = [i for i in spec.inputs if i >= len(on_grid)]
    if beyond:
        raise ConfigError(
            f"layer {name!r}: input_overrides.{beyond[0]}: it has {len(on_grid)} inputs, counted from 0"
        )
    # What the output's clamp cuts off says nothing about the input: full range here.
    default = InputSpec(spec.output, replace(spec.clip, half_range=False))
    found: list[InputSpec | None] = []
    for index, arrives_on_grid in enumerate(on_grid):
        what = f"input {index} of layer {name!r}"
        if is_mask(node, index):
            found.append(None)
        elif arrives_on_grid and index in spec.inputs:
            raise ConfigError(
                f"{what}: arrives quantized by the layer in front of it, and has an entry in "
                "input_overrides; remove that, or leave the layer in front in float"
            )
        elif not arrives_on_grid and index not in spec.inputs and not spec.input_fallback:
            raise ConfigError(
                f"{what}: arrives in float; quantize the layer in front of it, give the input an entry in "
                "input_overrides, or set inputs_quant_auto_fallback to true"
            )
        else:
            found.append(None if arrives_on_grid else spec.inputs.get(index, default))
    return tuple(found)


def quantizes_output(node: fx.Node, spec: LayerSpec | None) -> bool:
    """Whether a layer's output is put on a grid that activation ranges decide."""
    return layer_kind(node, spec, fused_away=False)[0] in (INTEGER, FAKE)


def output_ranges(
    traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec]
) -> dict[str, tuple[float, float]]:
    """The (min, max) that each output on a grid is given, by layer; arguments as for plan_model."""
    planner = _Planner(traced, stats, specs)
    found = {}
    for name, node, _ in layers(traced):
        if quantizes_output(node, specs.get(name)) and name not in planner.identities:
            x_min, x_max = planner.output_range(name, node, specs[name])
            found[name] = (float(x_min), float(x_max))
    return found


def layer_kind(node: fx.Node, spec: LayerSpec | None, fused_away: bool) -> tuple[str, str]:
    """What is done with a layer, by the constants above, and why if it is not what was asked.

    Args:
        node: of the folded network.
        spec: what is asked of it.
        fused_away: whether the layer in front of it computes it.
    """
    op: str = node.meta["op"]
    if fused_away:
        return IDENTITY, ""
    if spec is not None and spec.identity:
        same = len(tensor_inputs(node)) == 1 and _same_shape(tensor_inputs(node)[0], node)
        return (IDENTITY, "") if same else (FLOAT, "cannot be left out: its output has another shape")
    if spec is not None and spec.float_bits is not None:
        return _float_kind(op, spec)
    if spec is None or (spec.output is None and spec.weight is None):
        return FLOAT, NOT_ASKED
    if not ops.is_float_tensor(node.meta["value"]):
        return FLOAT, "gives several tensors"
    if op == "embedding":
        return (FLOAT, NOT_ASKED) if spec.weight is None else (EMBEDDING, "")
    if op in WEIGHTED and spec.weight is not None:
        return (WEIGHTS_ONLY if spec.output is None else INTEGER), ""
    if spec.output is None:
        return FLOAT, "has no weights"
    return (INTEGER if op in INTEGER_OPS and computes_only_tensors(node) else FAKE), ""


def _float_kind(op: str, spec: LayerSpec) -> tuple[str, str]:
    """What becomes of a layer that is to run in a float type of its own."""
    on_integers = op in WEIGHTED or op in INTEGER_OPS or op == "embedding"
    on_grid = spec.output is not None and (not on_integers if spec.fake is None else spec.fake)
    return (FAKE if on_grid else CAST), ""


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    shapes = [getattr(n.meta["value"], "shape", None) for n in (a, b)]
    return shapes[0] is not None and shapes[0] == shapes[1]


class _Planner:
    """Walks the layers in the order of execution; grids holds the grid of every value so far."""

    def __init__(self, traced: fx.GraphModule, stats: ModelStats, specs: Mapping[str, LayerSpec]) -> None:
        self.traced = traced
        self.specs = specs
        quantized = {n for n, node, _ in layers(traced) if quantizes_output(node, specs.get(n))}
        self.fused = fused_activations(traced, quantized)
        self.identities = {activation for activation, _ in self.fused.values()}
        self.identities |= {n for n, node, _ in layers(traced) if self._is_left_out(n, node)}
        # A layer that becomes part of the one in front of it gives that one's values.
        self.stats = edit_stats(traced, stats, quantized)
        self.grids: dict[fx.Node, QParams | None] = {}
        self.plans: dict[str, LayerPlan] = {}

    def run(self) -> ModelPlan:
        modules = {name: module for name, _, module in layers(self.traced)}
        for node in self.traced.graph.nodes:
            name = node.meta.get("layer")
            if name is None:
                self.grids[node] = self._kept_grid(node)
                continue
            plan = self._plan(name, node, modules[name])
            self.plans[name] = plan
            self.grids[node] = self._kept_grid(node) if plan.kind == IDENTITY else _grid_of_result(plan)
        return ModelPlan(self.plans, self.stats)

    def _is_left_out(self, name: str, node: fx.Node) -> bool:
        return layer_kind(node, self.specs.get(name), fused_away=False)[0] == IDENTITY

    def _kept_grid(self, node: fx.Node) -> QParams | None:
        """The grid of a value that was not computed: only the likes of dropout hand it on."""
        if node.meta["op"] in ops.KEEPS_GRID or node.meta.get("layer") in self.identities:
            return self.grids[tensor_inputs(node)[0]]
        return None

    def _plan(self, name: str, node: fx.Node, module: nn.Module) -> LayerPlan:
        spec = self.specs.get(name)
        kind, note = layer_kind(node, spec, name in self.identities)
        op: str = node.meta["op"]
        if spec is None or kind in (FLOAT, IDENTITY):
            return LayerPlan(kind, op, note=note)
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
        steps_per_unit = 1 / (grid.scale.double() * weight.scale.double())
        if spec.scale_approx_bits is not None:
            steps_per_unit = approximate_multiplier(exact_ratio(steps_per_unit), spec.scale_approx_bits)
        bias = getattr(module, "bias", None)
        bias_q = None if bias is None else quantize_bias(bias, steps_per_unit, spec.accum_bits)
        needed = accumulator_bits(grid, weight, weight_q, bias_q)
        return LayerPlan(
            INTEGER,
            node.meta["op"],
            inputs=fresh,
            output=self._output_grid(name, node, spec),
            activation=self._activation(name),
            weight=weight,
            weight_q=weight_q,
            float_weight=output_channels_first(module).clone() if spec.keep_float_weight else None,
            bias_q=bias_q,
            note=f"its sums can need {needed} bits" if needed > spec.accum_bits else "",
            accum_scale=1 / steps_per_unit,
            accum_bits=spec.accum_bits,
            accum_float64=spec.accum_float64 or beyond_float32(grid.spec, weight.spec),
            scale_approx_bits=spec.scale_approx_bits,
        )

    def _plan_weights_only(self, name: str, node: fx.Node, module: nn.Module, spec: LayerSpec) -> LayerPlan:
        assert spec.weight is not None
        weight, weight_q = self._weight(name, module, spec)
        bias = getattr(module, "bias", None)
        return LayerPlan(
            WEIGHTS_ONLY,
            node.meta["op"],
            inputs=(None,) * len(tensor_inputs(node)),
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
        weight, weight_q = quantize_weight(name, module, replace(spec.weight, axis=None), seen)
        kept = output_channels_first(module).clone() if spec.keep_float_weight else None
        return LayerPlan(
            EMBEDDING, node.meta["op"], output=weight, weight=weight, weight_q=weight_q, float_weight=kept
        )

    def _plan_integer_op(self, name: str, node: fx.Node, spec: LayerSpec) -> LayerPlan:
        fresh = self._fresh_inputs(name, node, spec)
        grids = [f or self.grids[s] for f, s in zip(fresh, tensor_inputs(node), strict=True)]
        accum_scale = torch.tensor(1.0, dtype=torch.float64)
        for grid in grids:
            assert grid is not None
            accum_scale = accum_scale * grid.scale.double()
        return LayerPlan(
            INTEGER,
            node.meta["op"],
            inputs=fresh,
            output=self._output_grid(name, node, spec),
            activation=self._activation(name),
            accum_scale=accum_scale,
            accum_bits=max(OP_ACCUM_BITS, spec.accum_bits),
            scale_approx_bits=spec.scale_approx_bits,
        )

    def _plan_fake(self, name: str, node: fx.Node, spec: LayerSpec, op: str) -> LayerPlan:
        # A convolution whose weights stay in float takes its inputs as they come.
        takes_as_is = (op in WEIGHTED and spec.float_bits is None) or not spec.quantize_inputs
        sources = tensor_inputs(node)
        inputs = (None,) * len(sources) if takes_as_is else self._fresh_inputs(name, node, spec)
        # So do parameters, such as those of a layer norm.
        inputs = tuple(None if source.op == "get_attr" else inputs[i] for i, source in enumerate(sources))
        return LayerPlan(
            FAKE,
            op,
            inputs=inputs,
            output=self._output_grid(name, node, spec),
            activation=self._activation(name),
            float_bits=spec.float_bits,
        )

    def _weight(self, name: str, module: nn.Module, spec: LayerSpec) -> tuple[QParams, Tensor]:
        assert spec.weight is not None
        given = (spec.weight_range, spec.weight_clip, spec.weight_range_factors)
        return quantize_weight(name, module, spec.weight, *given)

    def _activation(self, name: str) -> str | None:
        if name in self.fused:
            return self.fused[name][1]
        spec = self.specs.get(name)
        # Half range that the user asked for stands for a ReLU, as one in front of it would.
        return "relu" if spec is not None and spec.clip.half_range else None

    def _fresh_inputs(self, name: str, node: fx.Node, spec: LayerSpec) -> tuple[QParams | None, ...]:
        """Grids for the inputs that arrive in float, from this layer's own records of them."""
        asked = asked_of_inputs(name, node, spec, [self.grids[s] is not None for s in tensor_inputs(node)])
        return tuple(
            None if one is None else self._input_grid(name, index, one, spec)
            for index, one in enumerate(asked)
        )

    def _input_grid(self, name: str, index: int, asked: InputSpec, spec: LayerSpec) -> QParams:
        what = f"input {index} of layer {name!r}"
        x_min, x_max = self._range(what, self.stats.input(name, index), asked.grid, asked.clip)
        return self._qparams(what, x_min, x_max, asked.grid, spec)

    def _output_grid(self, name: str, node: fx.Node, spec: LayerSpec) -> QParams:
        assert spec.output is not None
        x_min, x_max = self.output_range(name, node, spec)
        return self._qparams(f"the output of layer {name!r}", x_min, x_max, spec.output, spec)

    def _qparams(self, what: str, x_min: Tensor, x_max: Tensor, grid: QuantSpec, spec: LayerSpec) -> QParams:
        try:
            return qparams_from_range(x_min, x_max, grid, spec.scale_approx_bits)
        except ValueError as error:  # numbers at the end of float32's range
            raise StatsError(f"{self.stats.source}: {what}: {error}") from error

    def output_range(self, name: str, node: fx.Node, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """The range of a layer's output: the one asked for, or one from the edited statistics."""
        assert spec.output is not None
        if spec.output_range is not None:
            x_min, x_max = (torch.tensor(float(v)) for v in spec.output_range)
            return x_min, x_max
        record, clip = self.stats.output(name), spec.clip
        if name in self.fused:
            clip = replace(clip, half_range=True)
        elif node.meta["op"] in FUSIBLE:
            clip = replace(clip, half_range=True)
            if clip.mode in ("gauss", "laplace"):
                # The distribution that ACIQ's half range describes is the one in front of the ReLU.
                before = self.stats.input(name, 0)
                record = replace(record, mean=before.mean, std=before.std, b=before.b)
        return self._range(f"the output of layer {name!r}", record, spec.output, clip)

    def _range(
        self, what: str, record: ActivationStats, grid: QuantSpec, clip: ClipSpec
    ) -> tuple[Tensor, Tensor]:
        try:
            return choose_range(record, grid, clip)
        except ValueError as error:
            if "needs" in str(error):
                raise StatsError(f"{self.stats.source}: {what}: {error}") from error
            raise ConfigError(f"{what}: {error}") from error


def _grid_of_result(plan: LayerPlan) -> QParams | None:
    return plan.output if plan.kind in (INTEGER, FAKE, EMBEDDING) else None


def beyond_float32(x: QuantSpec, weight: QuantSpec) -> bool:
    """Whether products alone fill float32's 24 bits, so that sums would be rounded for sure."""
    return x.num_bits + weight.num_bits > 16


def computes_only_tensors(node: fx.Node) -> bool:
    """Whether an add, mul, cat or matmul combines two or more float tensors and nothing else."""
    tensors = tensor_inputs(node)
    combined = node.args
    if node.meta["op"] == "cat":
        sequence = node.args[0] if node.args else node.kwargs.get("tensors")
        combined = tuple(sequence) if isinstance(sequence, (list, tuple)) else ()
        if not set(node.kwargs) <= {"tensors", "dim"}:
            return False
    elif node.kwargs:
        return False
    return len(tensors) >= 2 and list(combined) == tensors
