"""Put quantized modules into a network, given its plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.errors import ConfigError
from qtool.graph import ops
from qtool.graph.capped import CappedReLU6
from qtool.graph.fold import Folded, fold_batch_norms, move_stats, restore_layout
from qtool.graph.neighbours import reads_values
from qtool.graph.trace import copy_graph, layers, tensor_inputs
from qtool.numerics.spec import LayerSpec, QParams
from qtool.observers.stats import ModelStats
from qtool.quantizers import plan as plans
from qtool.quantizers.dynamic import DynamicBuilder
from qtool.quantizers.grids import Dequantize, Quantize, Requantize, largest_integer
from qtool.quantizers.layout import read_in_order
from qtool.quantizers.modules import Cast, FakeQuantize, QuantEmbedding, QuantProduct
from qtool.quantizers.plan import LayerPlan, ModelPlan, plan_dynamic, plan_model
from qtool.quantizers.plan.derived import grids_read
from qtool.quantizers.rescaling import QuantAdd, QuantAddOnce, QuantCat
from qtool.quantizers.weighted import QuantWeighted
from qtool.quantizers.weights import weight_centered, weight_values


class QuantizedModel(nn.Module):
    """A quantized network: it takes and gives float tensors, as the original does.

    Attributes:
        network: the graph; every layer keeps its name.
        plan: what became of each layer.
    """

    def __init__(self, network: fx.GraphModule, plan: ModelPlan) -> None:
        super().__init__()
        self.network = network
        self.plan = plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.plan.per_sample:
            return self.network(*args, **kwargs)
        samples = zip(*(a.split(1) for a in args), strict=True)
        results = [self.network(*sample, **kwargs) for sample in samples]
        return _together(results)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Refuse training: integers have no gradients."""
        if mode:
            raise RuntimeError("a quantized network is for evaluation only")
        return super().train(False)

    def integers(self, x: Tensor) -> dict[str, Tensor]:
        """The integers x_q that every quantized layer gives for an input batch, by layer name.

        Raises:
            ConfigError: in dynamic mode.
        """
        if self.plan.dynamic:
            raise ConfigError("dynamic mode: every batch has grids of its own, and no integers of fixed ones")
        found: dict[str, Tensor] = {}
        handles = []
        for name, layer in self.plan.layers.items():
            if layer.output is None:
                continue
            zero_point = layer.output.zero_point

            def note(_m: nn.Module, _a: Any, y: Tensor, name: str = name, z: Tensor = zero_point) -> None:
                found[name] = (y + z.to(y.device)).to(torch.int64)

            handles.append(self.network.get_submodule(name).register_forward_hook(note))
        try:
            with torch.no_grad():
                self.network(x)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _together(results: list[Any]) -> Any:
    """The results of single samples as those of a batch, in whatever they are kept."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results)
    if isinstance(first, dict):
        return {key: _together([result[key] for result in results]) for key in first}
    if isinstance(first, (tuple, list)):
        parts = [_together(list(part)) for part in zip(*results, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if is_dataclass(first):
        parts_of = {f.name: _together([getattr(r, f.name) for r in results]) for f in fields(first)}
        return replace(first, **parts_of)  # type: ignore[type-var]
    return first


def quantize_graph(
    traced: fx.GraphModule,
    stats: ModelStats | None,
    specs: Mapping[str, LayerSpec],
    per_sample: bool = False,
) -> QuantizedModel:
    """Quantize a traced network; the given one stays as it was.

    Args:
        traced: from graph.trace.trace.
        stats: of the same network, before or after its batch norms were folded; None for dynamic mode.
        specs: what is asked, by layer name.
        per_sample: whether ranges found at run time are those of each sample alone.
    """
    folded = fold_batch_norms(traced)
    if stats is None:
        return build(folded, ModelPlan(plan_dynamic(folded.traced, specs), per_sample=per_sample))
    return build(folded, plan_model(folded.traced, move_stats(stats, folded.pairs), specs))


def build(folded: Folded, plan: ModelPlan) -> QuantizedModel:
    """The quantized network that a plan describes.

    Args:
        folded: the network with batch norms folded; of quantized layers only the geometry is used.
        plan: of the same network.
    """
    network = copy_graph(folded.traced)
    for name, layer in plan.layers.items():
        if layer.op == "relu6" and layer.activation_limit is not None:
            network.set_submodule(name, CappedReLU6(layer.activation_limit).eval())
    if plan.dynamic:
        DynamicBuilder(network, plan.layers, FLOAT_BUILDERS).run()
    else:
        _Builder(network, plan.layers).run()
        read_in_order(network)
    network.delete_all_unused_submodules()
    network.recompile()
    return QuantizedModel(network.eval().requires_grad_(False), plan).eval()


class _Builder:
    """Rewrites a graph in place; grids holds the grid of every value so far, None for float."""

    def __init__(self, network: fx.GraphModule, layer_plans: Mapping[str, LayerPlan]) -> None:
        self.network = network
        self.plans = layer_plans
        self.grids: dict[fx.Node, QParams | None] = {}
        self.converted: dict[tuple[fx.Node, QParams | None], fx.Node] = {}

    def run(self) -> None:
        modules = {name: module for name, _, module in layers(self.network)}
        for node in list(self.network.graph.nodes):
            name = node.meta.get("layer")
            if name is None:
                self._pass_through(node)
            elif self.plans[name].kind == plans.IDENTITY:
                self._remove(node)
            else:
                self._replace(name, node, modules[name], self.plans[name])

    def _pass_through(self, node: fx.Node) -> None:
        """Nodes that are no layers: the grid goes through the likes of dropout, and ends elsewhere."""
        sources = tensor_inputs(node) if node.op != "output" else list(node.all_input_nodes)
        if node.meta["op"] in ops.KEEPS_GRID and sources:
            self.grids[node] = self.grids.get(sources[0])
            return
        self.grids[node] = None
        if not reads_values(node):
            return
        for source in dict.fromkeys(sources):
            self._feed(node, source, None)

    def _remove(self, node: fx.Node) -> None:
        node.replace_all_uses_with(tensor_inputs(node)[0])
        self.network.graph.erase_node(node)

    def _replace(self, name: str, node: fx.Node, module: nn.Module, plan: LayerPlan) -> None:
        sources = tensor_inputs(node)
        read = grids_read(node, plan, self.grids)
        if plan.kind == plans.INTEGER:
            for source, grid in zip(sources, read, strict=True):
                self._feed(node, source, grid)
        else:
            for index, source in enumerate(sources):
                fresh = plan.inputs[index] if plan.inputs else None
                if fresh is not None and self.grids[source] is None:
                    source_q = self._convert(source, fresh)
                    node.replace_input_with(source, source_q)
                    source = source_q
                self._feed(node, source, None)
        self.network.set_submodule(name, build_layer(module, plan, read, node))
        self.grids[node] = plan.output

    def _feed(self, node: fx.Node, source: fx.Node, grid: QParams | None) -> None:
        """Make node read source on a grid (None: in float)."""
        if self.grids[source] is grid:
            return
        node.replace_input_with(source, self._convert(source, grid))

    def _convert(self, source: fx.Node, grid: QParams | None) -> fx.Node:
        """The node that gives source's value on another grid; made once for all readers."""
        for (known, known_grid), converted in self.converted.items():
            if known is source and _same(known_grid, grid):
                return converted
        held = self.grids[source]
        assert (held is None) != (grid is None), "only borders between float and integers are converted"
        module = Quantize(grid) if grid is not None else Dequantize(held)  # type: ignore[arg-type]
        name = self._free_name(f"{source.meta.get('layer', source.name)}_{type(module).__name__.lower()}")
        self.network.add_submodule(name, module)
        with self.network.graph.inserting_after(source):
            converted = self.network.graph.call_module(name, (source,))
        converted.meta.update(op=type(module).__name__.lower(), value=source.meta["value"])
        self.grids[converted] = grid
        self.converted[source, grid] = converted
        return converted

    def _free_name(self, name: str) -> str:
        taken = {n for n, _ in self.network.named_modules()}
        while name in taken:
            name += "_"
        return name


def _same(a: QParams | None, b: QParams | None) -> bool:
    return a is b or (a is not None and b is not None and a.same_grid(b))


def build_layer(
    module: nn.Module, plan: LayerPlan, inputs: Sequence[QParams | None], node: fx.Node
) -> nn.Module:
    """The module of a layer of a static plan.

    Args:
        module: the float layer.
        plan: what becomes of it.
        inputs: the grid on which it reads each tensor input.
        node: the layer, for the number of dimensions of what it gives.
    """
    if plan.kind == plans.INTEGER:
        return _build_integer(module, plan, [grid for grid in inputs if grid is not None], node)
    return _BUILDERS[plan.kind](module, plan)


def _build_integer(module: nn.Module, plan: LayerPlan, inputs: list[QParams], node: fx.Node) -> nn.Module:
    assert plan.output is not None and plan.accum_scale is not None
    limit = plan.activation_limit
    if plan.op == "add":
        add = QuantAddOnce if plan.sum_once else QuantAdd
        return add(inputs, plan.output, plan.activation, plan.accum_bits, plan.everywhere_bits, limit)
    if plan.op == "cat":
        return QuantCat(inputs, plan.output, plan.activation, plan.accum_bits, plan.everywhere_bits, limit)
    num_dims = node.meta["value"].dim()
    last = plan.op in ("linear", "matmul")
    requantize = Requantize(
        plan.output,
        plan.accum_scale,
        plan.activation,
        plan.scale_approx_bits,
        num_dims,
        channel_axis=-1 if last else 1,
        limit=limit,
    )
    if plan.op in plans.WEIGHTED:
        assert plan.weight is not None and plan.weight_q is not None
        return QuantWeighted(
            module,
            weight_centered(plan.weight, plan.weight_q, module),
            plan.bias_q,
            requantize,
            plan.accum_bits,
            torch.float64 if plan.accum_float64 else torch.float32,
            largest_integer(inputs[0]),
        )
    functions = {"matmul": torch.matmul, "mul": torch.mul}
    function: Any = functions.get(plan.op) or module.function
    return QuantProduct(function, requantize, plan.accum_bits)


def _build_fake(module: nn.Module, plan: LayerPlan) -> nn.Module:
    assert plan.output is not None
    operation = module if plan.float_bits is None else Cast(module, plan.float_bits)
    return FakeQuantize(operation, plan.output, plan.activation, plan.activation_limit)


def _build_cast(module: nn.Module, plan: LayerPlan) -> nn.Module:
    assert plan.float_bits is not None
    return Cast(module, plan.float_bits)


def _build_weights_only(module: nn.Module, plan: LayerPlan) -> nn.Module:
    """A copy of the layer with the weights that its integers stand for."""
    assert plan.weight is not None and plan.weight_q is not None
    layer: Any = copy.copy(module)
    layer._parameters = dict(module._parameters)
    weight = restore_layout(weight_values(plan.weight, plan.weight_q), module)
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    if plan.bias is not None:
        layer.bias = nn.Parameter(plan.bias, requires_grad=False)
    return layer if plan.activation is None else nn.Sequential(layer, nn.ReLU())


def _build_embedding(module: nn.Module, plan: LayerPlan) -> nn.Module:
    assert plan.weight is not None and plan.weight_q is not None
    return QuantEmbedding(weight_centered(plan.weight, plan.weight_q, module))


# What takes and gives floats.
FLOAT_BUILDERS: dict[str, Callable[[nn.Module, LayerPlan], nn.Module]] = {
    plans.CAST: _build_cast,
    plans.WEIGHTS_ONLY: _build_weights_only,
    plans.FLOAT: lambda module, _plan: module,
}
_BUILDERS = {**FLOAT_BUILDERS, plans.FAKE: _build_fake, plans.EMBEDDING: _build_embedding}
