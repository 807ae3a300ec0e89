"""From the simulated network to torch's int8 kernels: a graph of the same layers.

Every value of the simulation that is on a grid has up to three forms here, made when first read: a
quantized tensor for int8 kernels, centered integers for layers that run as in the simulation, and
floats. What an int8 kernel cannot give exactly runs as in the simulation, so that the two networks
agree up to rounding at ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qtool.deploy.native.containers import (
    Container,
    FloatThenGrid,
    FromGrid,
    Pack,
    ToGrid,
    Unpack,
    clamp_of,
    container_for,
)
from qtool.deploy.native.kernels import Conv, Linear
from qtool.deploy.native.portable import FloatResult
from qtool.deploy.native.rules import (
    ENDS_CHANNELS,
    FLOAT_RULES,
    INTEGER_RULES,
    Rule,
    Site,
    lower_to_float,
)
from qtool.deploy.native.target import Target
from qtool.deploy.native.trial import disagreement, float_disagreement
from qtool.deploy.native.weights import NotNative
from qtool.graph import ops
from qtool.graph.trace import tensor_inputs
from qtool.numerics.spec import QParams
from qtool.quantizers import plan as plans
from qtool.quantizers.grids import Dequantize, Quantize
from qtool.quantizers.modules import FakeQuantize
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.prepare import QuantizedModel

# How a layer of the converted network runs.
INT8 = "int8 kernel"
SIMULATED = "simulated"  # on centered integers, as in the simulation
IN_FLOAT = "float"  # between a dequantize and a quantize, or in a part that stays in float

# The forms of a value.
KERNEL, CENTERED, FLOATS = "kernel", "centered", "floats"
IN_ORDER = "floats in the usual order in memory"


@dataclass(frozen=True)
class NativeLayer:
    """What became of one layer.

    Args:
        op: what it computes.
        runs: one of INT8, SIMULATED and IN_FLOAT.
        why: the reason if it is not INT8, or "".
        container: of its output, where that is a quantized tensor.
        saturating: output channels whose sums could saturate on a processor without VNNI.
    """

    op: str
    runs: str
    why: str = ""
    container: Container | None = None
    saturating: int = 0


def lower(model: QuantizedModel, target: Target) -> tuple[fx.GraphModule, dict[str, NativeLayer]]:
    """The network on int8 kernels, and what became of each layer; layers keep their names.

    Args:
        model: a static quantized network.
        target: where it is to run.
    """
    lowering = _Lowering(model, target)
    return lowering.run(), lowering.found


class _Lowering:
    """Walks the simulated graph in order of execution and writes the new one."""

    def __init__(self, model: QuantizedModel, target: Target) -> None:
        self.network = model.network
        self.plans = model.plan.layers
        self.target = target
        self.modules = dict(model.network.named_modules())
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.forms: dict[tuple[fx.Node, str], fx.Node] = {}
        self.grids: dict[fx.Node, QParams] = {}
        self.containers: dict[fx.Node, Container] = {}
        self.found: dict[str, NativeLayer] = {}

    def run(self) -> fx.GraphModule:
        for node in self.network.graph.nodes:
            name = node.meta.get("layer")
            if name is not None:
                self._layer(name, node, self.plans[name])
            elif isinstance(self._module(node), Quantize):
                self._note_grid(node, self._module(node).qparams)
            elif self._source(node) is node:
                self._copy(node)
        native = fx.GraphModule(self.root, self.graph, "NativeNetwork")
        native.graph.eliminate_dead_code()
        native.delete_all_unused_submodules()
        native.recompile()
        return native.eval()

    def _module(self, node: fx.Node) -> Any:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _source(self, node: fx.Node) -> fx.Node:
        """The node whose value this one hands on in another form, or unchanged."""
        while isinstance(self._module(node), Dequantize) or (
            node.meta.get("op") in ops.KEEPS_GRID and tensor_inputs(node)
        ):
            (node,) = tensor_inputs(node)[:1]
        return node

    def _note_grid(self, node: fx.Node, grid: QParams, plan: LayerPlan | None = None) -> None:
        self.grids[node] = grid
        limits = () if plan is None else (clamp_of(plan), plan.activation_limit)
        container = container_for(grid, *limits)
        if container is not None:
            self.containers[node] = container

    def _get(self, node: fx.Node, form: str) -> fx.Node:
        """A value in one of its forms."""
        source = self._source(node)
        if (source, form) not in self.forms:
            self.forms[source, form] = self._make(source, form)
        if form == FLOATS and self._is_in_order(node):
            if (source, IN_ORDER) not in self.forms:
                floats = self.forms[source, FLOATS]
                self.forms[source, IN_ORDER] = self.graph.call_method("contiguous", (floats,))
            return self.forms[source, IN_ORDER]
        return self.forms[source, form]

    def _is_in_order(self, node: fx.Node) -> bool:
        """Whether a value is put in the usual order in memory on the way; kernels give channels last."""
        while node is not self._source(node):
            if node.meta.get("op") == "contiguous":
                return True
            (node,) = tensor_inputs(node)[:1]
        return False

    def _make(self, node: fx.Node, form: str) -> fx.Node:
        is_border = isinstance(self._module(node), Quantize)
        if form == FLOATS:
            if (node, KERNEL) in self.forms:
                return self._call(
                    node, "dequantize", FromGrid(self.containers[node]), self.forms[node, KERNEL]
                )
            return self._call(node, "dequantize", Dequantize(self.grids[node]), self._get(node, CENTERED))
        if form == KERNEL:
            container = self.containers[node]
            if is_border and (node, CENTERED) not in self.forms:
                return self._call(node, "quantize", ToGrid(container), self._read_by(node))
            return self._call(node, "pack", Pack(container), self._get(node, CENTERED))
        if (node, KERNEL) in self.forms:
            return self._call(node, "unpack", Unpack(self.containers[node]), self.forms[node, KERNEL])
        assert is_border, "a layer's own form is there from the beginning"
        return self._call(node, "quantize", Quantize(self.grids[node]), self._read_by(node))

    def _read_by(self, node: fx.Node) -> fx.Node:
        """The float value that a border quantizes."""
        return self._get(tensor_inputs(node)[0], FLOATS)

    def _call(self, node: fx.Node, kind: str, module: nn.Module, argument: fx.Node) -> fx.Node:
        name = f"{node.meta.get('layer', node.name)}_{kind}".replace(".", "_")
        while name in self.modules or hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, module)
        return self.graph.call_module(name, (argument,))

    def _copy(self, node: fx.Node) -> None:
        """A node that is no layer: it reads floats, or only the shape of what it reads."""

        def read(argument: fx.Node) -> fx.Node:
            source = self._source(argument)
            if source is argument and source in self.grids:  # on its grid, so read for its shape
                form = next((f for f in (KERNEL, CENTERED) if (source, f) in self.forms), CENTERED)
                return self._get(source, form)
            return self._get(argument, FLOATS)

        if node.op == "get_attr":
            self._adopt(str(node.target))
        elif node.op == "call_module":
            _set_module(self.root, str(node.target), self._module(node))
        self.forms[node, FLOATS] = self.graph.node_copy(node, read)

    def _adopt(self, path: str) -> None:
        """Take over a parameter or buffer."""
        value: Any = self.network
        for part in path.split("."):
            value = getattr(value, part)
        parent, _, name = path.rpartition(".")
        owner = _submodule(self.root, parent)
        owner.register_buffer(name, value.detach() if isinstance(value, nn.Parameter) else value)

    def _layer(self, name: str, node: fx.Node, plan: LayerPlan) -> None:
        module = self._module(node)
        if plan.output is None:
            self._without_grid(name, node, plan, module)
            return
        self._note_grid(node, plan.output, plan)
        container = self.containers.get(node)
        try:
            site = self._site(node, plan, module, container)
            native = self._converted(site, _rules(plan.kind))
            self._write(name, node, native, KERNEL, KERNEL)
            why = getattr(native, "why", "")
            saturating = native.weights.saturating if isinstance(native, (Conv, Linear)) else 0
            self.found[name] = NativeLayer(plan.op, IN_FLOAT if why else INT8, why, container, saturating)
        except NotNative as reason:
            self._write_other(name, node, plan, module, container, str(reason))

    def _without_grid(self, name: str, node: fx.Node, plan: LayerPlan, module: nn.Module) -> None:
        """A layer that gives floats: on a kernel, if it has integer weights and reads integers."""
        why = plan.note or _WHY_FLOAT.get(plan.kind, plan.kind)
        source = self._source(tensor_inputs(node)[0]) if plan.kind == plans.WEIGHTS_ONLY else None
        if source in self.grids:
            assert source is not None
            try:
                native = self._to_float(node, plan, module, source)
                self._write(name, node, native, KERNEL, FLOATS)
                self.found[name] = NativeLayer(plan.op, INT8, saturating=native.weights.saturating)
                return
            except NotNative as reason:
                why = str(reason)
        self._write(name, node, module, FLOATS, FLOATS)
        self.found[name] = NativeLayer(plan.op, IN_FLOAT, why)

    def _to_float(self, node: fx.Node, plan: LayerPlan, module: nn.Module, source: fx.Node) -> FloatResult:
        """A layer's module on a kernel that gives floats, tried out against the simulation's.

        Raises:
            NotNative: if there is none, or it gives something else on this machine.
        """
        container = self.containers.get(source)
        if container is None:
            raise NotNative(
                f"its input has {self.grids[source].spec.num_bits} bits; --qe-bits-acts 8 or fewer"
            )
        try:
            native = lower_to_float(module, plan, container, self.target)
            shape = tensor_inputs(node)[0].meta["value"].shape
            difference = float_disagreement(module, native, shape, container)
        except (RuntimeError, TypeError) as error:  # what a kernel says to its arguments
            raise NotNative(f"torch: {' '.join(str(error).split())[:120]}") from error
        if difference is not None:
            raise NotNative(f"torch's kernel differs from the simulation {difference}")
        return native

    def _write_other(
        self,
        name: str,
        node: fx.Node,
        plan: LayerPlan,
        module: nn.Module,
        container: Container | None,
        why: str,
    ) -> None:
        """A layer without an int8 kernel, in the form that is exact and costs least."""
        ends_itself = plan.activation_limit is None or plan.op == "relu6"
        if plan.kind == plans.FAKE and container is not None and ends_itself:
            assert isinstance(module, FakeQuantize)
            self._write(name, node, FloatThenGrid(module.operation, container), FLOATS, KERNEL)
            self.found[name] = NativeLayer(plan.op, IN_FLOAT, why, container)
            return
        reads = CENTERED if plan.kind == plans.INTEGER else FLOATS
        self._write(name, node, module, reads, CENTERED)
        self.found[name] = NativeLayer(plan.op, SIMULATED, why)

    def _site(self, node: fx.Node, plan: LayerPlan, module: nn.Module, output: Container | None) -> Site:
        """What a rule is to know of a layer.

        Raises:
            NotNative: if its inputs or its output cannot be quantized tensors.
        """
        if plan.op not in _rules(plan.kind):
            raise NotNative(f"no int8 kernel for {plan.op!r} that gives the simulation's integers")
        assert plan.output is not None
        if plan.activation_limit is not None and (plan.kind == plans.FAKE or plan.op not in ENDS_CHANNELS):
            raise NotNative("the ReLU6 behind it ends elsewhere in each channel; int8 kernels have one end")
        if output is None:
            raise NotNative(f"its output has {plan.output.spec.num_bits} bits; --qe-bits-acts 8 or fewer")
        if set(node.all_input_nodes) != set(tensor_inputs(node)):
            raise NotNative("reads numbers that are found at run time")
        inputs = []
        for source in (self._source(n) for n in tensor_inputs(node)):
            if source not in self.grids:
                raise NotNative("its input arrives in float")
            if source not in self.containers:
                bits = self.grids[source].spec.num_bits
                raise NotNative(f"its input has {bits} bits; --qe-bits-acts 8 or fewer")
            inputs.append(self.containers[source])
        if plan.kind == plans.FAKE and len(inputs) != 1:
            raise NotNative(f"no int8 kernel for {plan.op!r} of {len(inputs)} tensors")
        return Site(node, module, plan, tuple(inputs), output, self.target)

    def _converted(self, site: Site, rules: dict[str, Rule]) -> nn.Module:
        """The module on int8 kernels, tried out against the simulation's.

        Raises:
            NotNative: if there is none, or it gives something else on this machine.
        """
        try:
            native = rules[site.plan.op](site)
            difference = disagreement(site, native)
        except (RuntimeError, TypeError) as error:  # what a kernel says to its arguments
            raise NotNative(f"torch: {' '.join(str(error).split())[:120]}") from error
        if difference is not None:
            raise NotNative(f"torch's kernel differs from the simulation {difference}")
        return native

    def _write(self, name: str, node: fx.Node, module: nn.Module, reads: str, gives: str) -> None:
        _set_module(self.root, name, module)
        written = self.graph.node_copy(node, self._reader(reads))
        written.target = name
        self.forms[node, gives] = written

    def _reader(self, form: str) -> Callable[[fx.Node], fx.Node]:
        """What a layer reads; values that are no floats come as they are."""

        def read(argument: fx.Node) -> fx.Node:
            is_float = ops.is_float_tensor(argument.meta.get("value"))
            return self._get(argument, form if is_float else FLOATS)

        return read


_WHY_FLOAT = {
    plans.WEIGHTS_ONLY: "only its weights are quantized; --qe-bits-acts 8",
    plans.CAST: "runs in a float type of its own",
    plans.FLOAT: plans.NOT_ASKED,
}


def _rules(kind: str) -> dict[str, Rule]:
    return {plans.INTEGER: INTEGER_RULES, plans.FAKE: FLOAT_RULES}.get(kind, {})


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path; what lacks is made."""
    for part in filter(None, path.split(".")):
        if not isinstance(getattr(root, part, None), nn.Module):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    _submodule(root, parent).add_module(name, module)
