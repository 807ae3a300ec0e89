"""From a traced network, float or quantized, to the nodes of an ONNX graph.

Every value is written as floats. A value on a grid is what a DequantizeLinear gives, so that a layer and
the QuantizeLinear and DequantizeLinear around it say what a runtime's integer kernel is to compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.onnx.grids import OnGrid, put_on_grid
from qtool.deploy.onnx.moves import MOVES, split
from qtool.deploy.onnx.rules import FLOAT_RULES
from qtool.deploy.onnx.shapes import Shapes
from qtool.deploy.onnx.site import Site
from qtool.deploy.onnx.sums import Summand, write_sum
from qtool.deploy.onnx.weighted import write_integer, write_weights_only
from qtool.deploy.onnx.writer import NotInOnnx, Writer
from qtool.errors import ConfigError
from qtool.graph import ops
from qtool.graph.trace import tensor_inputs
from qtool.numerics.spec import QParams
from qtool.quantizers import plan as plans
from qtool.quantizers.grids import Dequantize, Quantize
from qtool.quantizers.modules import Cast, FakeQuantize, QuantProduct
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.rescaling import QuantAdd, QuantCat

# onnxruntime leaves these out in front of a QuantizeLinear whose range ends where they do, and is then left
# with two roundings that follow each other.
LEFT_OUT = frozenset({"relu", "relu6", "clamp", "hardtanh"})


@dataclass(frozen=True)
class Written:
    """What a network has become.

    Args:
        w: its nodes and constants.
        input: the placeholder, and the shape of an image.
        outputs: name of each result -> the number of its dimensions.
        layers: name of each layer on a grid -> its tensors.
        borders: name of each float tensor that is put on a grid in front of a layer -> the grid.
    """

    w: Writer
    shape: tuple[int, ...]
    outputs: dict[str, int]
    layers: dict[str, OnGrid]
    borders: dict[str, QParams]


def write_network(
    network: fx.GraphModule,
    layer_plans: Mapping[str, LayerPlan],
    shape: tuple[int, ...],
    opset: int,
    flag: str,
) -> Written:
    """Write a network; layers keep their names.

    Args:
        network: a traced float network, or that of a QuantizedModel.
        layer_plans: of the layers; none for a float network.
        shape: (C, H, W) of an image.
        opset: version of the operators.
        flag: that asks for it, for messages.

    Raises:
        ConfigError: naming the first layer that cannot be written, why, and what would work.
    """
    return _Lowering(network, layer_plans, shape, opset, flag).run()


class _Lowering:
    """Walks a graph in order of execution."""

    def __init__(
        self,
        network: fx.GraphModule,
        layer_plans: Mapping[str, LayerPlan],
        shape: tuple[int, ...],
        opset: int,
        flag: str,
    ) -> None:
        self.network = network
        self.plans = layer_plans
        self.shape = shape
        self.flag = flag
        self.w = Writer(opset)
        self.modules = dict(network.named_modules())
        self.names: dict[fx.Node, str | list[str]] = {}
        self.grids: dict[fx.Node, QParams] = {}
        self.layers: dict[str, OnGrid] = {}
        self.borders: dict[str, QParams] = {}
        self.outputs: dict[str, int] = {}
        try:
            self.shapes = Shapes(network, shape)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"{flag}: the network takes batches of one size only: {reason}") from error

    def run(self) -> Written:
        for node in self.network.graph.nodes:
            try:
                self._node(node)
            except NotInOnnx as reason:
                kind = "layer" if "layer" in node.meta else node.meta.get("op", node.op)
                name = node.meta.get("layer", node.name)
                raise ConfigError(f"{self.flag}: {kind} {name!r}: {reason}") from reason
        return Written(self.w, self.shape, self.outputs, self.layers, self.borders)

    def _node(self, node: fx.Node) -> None:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if node.op == "placeholder":
            self._input(node)
        elif node.op == "output":
            self._results(node.args[0])
        elif not _has_tensors(self.shapes.value(node)) or self.shapes.constant(node) is not None:
            return  # a number, known by now; or a constant, written when it is read
        elif isinstance(module, Quantize):
            self._border(node, module.qparams)
        elif "layer" in node.meta:
            self._layer(node.meta["layer"], node, module)
        else:
            self._other(node, module)

    def _input(self, node: fx.Node) -> None:
        if self.w.input:
            if self.shapes.value(node) is not None:
                raise NotInOnnx("is a second input; networks of one input are written")
            return
        self.w.input = self.w.free_name(str(node.target))
        self.names[node] = self.w.input

    def _name(self, node: fx.Node) -> str:
        """The name of the floats that a node gives."""
        if node not in self.names:
            constant = self.shapes.constant(node)
            if constant is None:
                raise NotInOnnx(f"reads {node.name!r}, which is no tensor of floats")
            self.names[node] = self.w.tensor(
                constant, str(node.target) if node.op == "get_attr" else node.name
            )
        name = self.names[node]
        if not isinstance(name, str):
            raise NotInOnnx(f"reads all parts of {node.name!r} at once")
        return name

    def _border(self, node: fx.Node, grid: QParams) -> None:
        (source,) = tensor_inputs(node)
        name = self._name(source)
        self.names[node] = put_on_grid(self.w, name, grid, apart=self._was_on_grid(source)).floats
        self.grids[node] = grid
        self.borders[name] = grid

    def _was_on_grid(self, node: fx.Node) -> bool:
        """Whether a float value is one that was on a grid, moved at most."""
        while "layer" not in node.meta and tensor_inputs(node):
            node = tensor_inputs(node)[0]
        return node in self.grids

    def _other(self, node: fx.Node, module: nn.Module | None) -> None:
        """A node that is no layer."""
        op = node.meta.get("op")
        if isinstance(module, Dequantize) or op in ops.KEEPS_GRID:
            (source,) = tensor_inputs(node)[:1]
            self.names[node] = self._name(source)
            if source in self.grids and op in ops.KEEPS_GRID:
                self.grids[node] = self.grids[source]
            return
        if op == "getitem" and isinstance(self.names.get(node.args[0]), list):  # type: ignore[arg-type]
            parts = self.names[node.args[0]]  # type: ignore[index]
            self.names[node] = parts[self.shapes.fixed(node.args[1])]
            return
        site = Site(self.w, self.shapes, node, module, node.name, self._name)
        if op in ops.SPLITS:
            self.names[node] = split(site)
        elif op == "getattr" and node.args[1] in ("T", "mT"):
            perm = list(range(len(site.sizes())))
            perm[-2:] = perm[:-3:-1]
            self.names[node] = site.op("Transpose", site.tensor(), perm=perm)
        elif op in MOVES:
            self.names[node] = MOVES[op](site)
        else:
            raise NotInOnnx("has no form in ONNX that qtool writes")

    def _layer(self, name: str, node: fx.Node, module: nn.Module | None) -> None:
        plan = self.plans.get(name)
        operation = module.operation if isinstance(module, FakeQuantize) else module
        if isinstance(operation, Cast):
            raise NotInOnnx("runs in a float type of its own; quantize without float_bits for it")
        site = Site(self.w, self.shapes, node, operation, name, self._name)
        if plan is None or plan.kind in (plans.FLOAT, plans.FAKE):
            result = self._float(site)
            if plan is not None and plan.op in plans.WEIGHTED:
                # onnxruntime quantizes a layer between DequantizeLinear and QuantizeLinear whose weights
                # are floats, on grids of its own; not if something stands in between.
                lowest = self.w.number(float(torch.finfo(torch.float32).min))
                result = self.w.op("Max", [result, lowest], f"{name}_float")
        elif plan.kind == plans.WEIGHTS_ONLY:
            result = write_weights_only(site, plan)
            if plan.activation == "relu":
                result = self.w.op("Relu", [result], f"{name}_relu")
        elif plan.kind == plans.INTEGER:
            result = self._integer(site, plan)
        else:
            raise NotInOnnx(f"computes as {plan.kind!r}, which has no form in ONNX that qtool writes")
        self.names[node] = result
        if plan is not None and plan.output is not None:
            limits = (plan.activation, plan.activation_limit)
            on_grid = put_on_grid(self.w, result, plan.output, *limits, apart=plan.op in LEFT_OUT)
            self.names[node], self.layers[name] = on_grid.floats, on_grid
            self.grids[node] = plan.output

    def _float(self, site: Site) -> str:
        op = site.node.meta["op"]
        if op not in FLOAT_RULES:
            raise NotInOnnx(f"{op!r} has no form in ONNX that qtool writes")
        if not isinstance(self.shapes.value(site.node), Tensor):
            raise NotInOnnx("gives several tensors")
        return FLOAT_RULES[op](site)

    def _integer(self, site: Site, plan: LayerPlan) -> str:
        """A layer that computes on integers, up to its output's grid."""
        if plan.op in plans.WEIGHTED:
            return write_integer(site, plan, self.grids[site.source])
        factors = self._factors(site, plan)
        if isinstance(site.module, QuantProduct):
            product = self._float(site)
            return self._scaled(product, factors[0], f"{site.name}_rescaled")
        scaled = [
            self._scaled(self._name(node), factor, f"{self._name(node)}_rescaled")
            for node, factor in zip(tensor_inputs(site.node), factors, strict=True)
        ]
        if isinstance(site.module, QuantCat):
            return self.w.op("Concat", scaled, site.name, axis=site.setting("dim", 1, 0))
        return self._sum(site, scaled, plan)

    def _sum(self, site: Site, names: list[str], plan: LayerPlan) -> str:
        """A sum of two or more tensors."""
        assert plan.output is not None
        grids = [self.grids[node] for node in tensor_inputs(site.node)]
        if len(names) == 2 and not plan.sum_once:
            first, second = (Summand(n, g) for n, g in zip(names, grids, strict=True))
            return write_sum(self.w, first, second, plan.output, site.name)
        return self.w.op("Add" if len(names) == 2 else "Sum", names, site.name)

    def _factors(self, site: Site, plan: LayerPlan) -> list[float]:
        """What the simulation multiplies by, relative to the exact ratios of scales."""
        assert plan.output is not None
        grids = [self.grids[node] for node in tensor_inputs(site.node)]
        module, out = site.module, float(plan.output.scale)
        if isinstance(module, (QuantAdd, QuantCat)):
            return [r * out / float(g.scale) for r, g in zip(module.ratios, grids, strict=True)]
        assert isinstance(module, QuantProduct)
        exact = 1.0
        for grid in grids:
            exact *= float(grid.scale)
        return [float(module.requantize.ratio) * out / exact]

    def _scaled(self, name: str, factor: float, wanted: str) -> str:
        """A tensor times a factor, unless that is one up to rounding."""
        return name if abs(factor - 1) < 1e-6 else self.w.op("Mul", [name, self.w.number(factor)], wanted)

    def _results(self, value: Any) -> None:
        """The outputs of the graph: a tensor, or those in a nest of tuples and dicts."""
        for key, node in _flat(value, ""):
            name = self.w.op("Identity", [self._name(node)], key or "output")
            self.outputs[name] = len(self.shapes.sizes(node))


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor)


def _flat(value: Any, key: str) -> list[tuple[str, fx.Node]]:
    """The nodes in a result, with names made of keys and numbers."""
    if isinstance(value, fx.Node):
        return [(key, value)]
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(v, f"{key}_{k}" if key else str(k))]
    if isinstance(value, (tuple, list)):
        named = [(f"{key or 'output'}_{n}", v) for n, v in enumerate(value)]
        return [pair for k, v in named for pair in _flat(v, k)]
    if value is None:
        return []
    if is_dataclass(value) and not isinstance(value, type):
        return _flat(vars(value), key)
    raise NotInOnnx(f"gives {value!r}, which is no tensor")
