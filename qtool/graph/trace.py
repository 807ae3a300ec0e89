"""One torch.fx trace in which every computing operation is a module with a stable name.

A module that is called once keeps its path. One that is called several times becomes path1,
path2, ... in call order. A tensor operator or function gets the path of the module whose forward
contains it plus its own name (`layer1.0.add`), numbered when there are several. So everything after
tracing works on named modules: what is observed, matched, folded, replaced, reported and saved.

Nothing in the graph writes into its input: operations in place are replaced by their pure form.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from qtool.errors import ModelError
from qtool.graph import ops
from qtool.graph.capture import capture, one_line
from qtool.graph.control import UncapturedPath, decide
from qtool.graph.decompose import decompose
from qtool.graph.examples import call, placeholder_values, shape_text
from qtool.graph.expand import expand_calls
from qtool.graph.parameters import fold_constants, make_layers
from qtool.graph.pure import has_effect
from qtool.graph.unbounded import is_unbounded, mark_unbounded

# How far the traced network may be from the original on the example, relative to the largest output.
TRACE_TOLERANCE = 1e-4


def trace(model: nn.Module, example: Any, check: bool = True) -> fx.GraphModule:
    """Capture a network as a graph of named layers; the given model stays as it was.

    Args:
        model: any network that capture can take; it is taken in evaluation mode.
        example: one input batch, or a tuple or dict of several inputs, used to learn the shapes and to
            check that the traced network computes the same as the original.
        check: whether to run the original for that; weights that mean nothing may send it anywhere.

    Returns:
        A GraphModule of its own (a copy), whose nodes carry `meta["value"]`, the shape and dtype of
        their result (a meta tensor), `meta["op"]`, what they compute, `meta["unbounded"]`, whether
        they are masks (see unbounded.py), and for layers `meta["layer"]`, the name. Where values decide
        what runs, see control.py.

    Raises:
        ModelError: if the network cannot be traced, run on the example, or if the trace computes
            something else.
    """
    root = copy.deepcopy(model).eval().requires_grad_(False)
    if check:
        with _refusing_packed(root), _without_fast_path():
            expected = _run(root, example)
    root = decompose(root)
    traced = capture(root, example)
    traced.graph.eliminate_dead_code(has_effect)
    _simplify(traced, example)
    _note_ops(traced)
    mark_unbounded(traced, placeholder_values(traced, example))
    _note_deciders(traced.graph)
    _name_layers(traced)
    if check:
        # An example without a branch for it says nothing against the others.
        with suppress(UncapturedPath):
            _check_same(expected, _run(traced, example))
    return traced


def layers(traced: fx.GraphModule) -> Iterator[tuple[str, fx.Node, nn.Module]]:
    """The computing operations in the order of execution: name, node, module."""
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if "layer" in node.meta:
            yield node.meta["layer"], node, modules[node.meta["layer"]]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The float tensors that a node reads, in the order in which they stand in the call."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return [n for n in found if ops.is_float_tensor(n.meta.get("value"))]


def is_mask(node: fx.Node, index: int) -> bool:
    """Whether a float tensor that a node reads is a mask; its -inf is on no grid, so it stays in float."""
    return (node.meta["op"] == "softmax" and index > 0) or is_unbounded(tensor_inputs(node)[index])


def copy_graph(traced: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be changed without changing the given one; the leaf modules are shared."""
    copied = fx.GraphModule(traced, copy.deepcopy(traced.graph), class_name=type(traced).__name__)
    return copied.eval()


@contextmanager
def _refusing_packed(model: nn.Module) -> Iterator[None]:
    """Inside, a recurrent module that is given a packed sequence says why that cannot be quantized."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):

            def refuse(_module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
                    raise ModelError(
                        f"module {name!r} takes a packed sequence, whose steps have batches of different "
                        "sizes; give it the padded tensor, and read the output at each sequence's last step"
                    )

            handles.append(module.register_forward_pre_hook(refuse, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Inside, torch computes attention step by step: its fused kernel gives zeros where a key is padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(model: nn.Module, example: Any) -> Any:
    try:
        with torch.no_grad():
            return call(model, example)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the network cannot take an input of shape {shape_text(example)}: "
            f"{one_line(error)}; check --input-shape and the data"
        ) from error


class _ValueRecorder(fx.Interpreter):
    """Runs the graph once and notes what every node gives, without keeping the numbers."""

    def run_node(self, n: fx.Node) -> Any:
        # Branches that the example does not take have values too.
        result = n.target is decide or super().run_node(n)
        n.meta["value"] = fx.node.map_aggregate(
            result, lambda v: v.to("meta") if isinstance(v, Tensor) else v
        )
        return result


def _simplify(traced: fx.GraphModule, example: Any) -> None:
    """Give every node its value, and every computation the form in which it can be quantized."""
    _record_values(traced, example)
    fold_constants(traced)
    if expand_calls(traced):
        _record_values(traced, example)
        fold_constants(traced)
    make_layers(traced)
    traced.recompile()


def _record_values(traced: fx.GraphModule, example: Any) -> None:
    with torch.no_grad():
        _ValueRecorder(traced).run(*placeholder_values(traced, example), enable_io_processing=False)


def _note_ops(traced: fx.GraphModule) -> None:
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        node.meta["op"] = ops.node_op(node, modules)


def _note_deciders(graph: fx.Graph) -> None:
    """Mark what is computed only to decide which branch is taken."""
    for node in reversed(graph.nodes):
        decides = bool(node.users) and all(u.target is decide or u.meta["decides"] for u in node.users)
        node.meta["decides"] = decides


def _is_layer(node: fx.Node) -> bool:
    """Whether a node computes floats from tensors, rather than moving or reading them."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    op = node.meta["op"]
    if op in ops.KEEPS_GRID or op in ops.MOVES:
        return False
    value = node.meta["value"]
    results = value if isinstance(value, (tuple, list)) else (value,)
    reads_tensor = any(isinstance(n.meta.get("value"), Tensor) for n in node.all_input_nodes)
    return reads_tensor and any(ops.is_float_tensor(v) for v in results)


def _name_layers(traced: fx.GraphModule) -> None:
    """Give each layer its name, and turn it into a module of that name."""
    modules = dict(traced.named_modules())
    nodes = [node for node in traced.graph.nodes if _is_layer(node)]
    bases = {node: _base_name(node) for node in nodes}
    calls = Counter(bases.values())
    taken = {base for base, count in calls.items() if count == 1} | set(modules) - set(bases.values())
    seen: Counter[str] = Counter()
    for node in nodes:
        base = bases[node]
        name = base
        if calls[base] > 1:
            seen[base] += 1
            name = f"{base}{seen[base]}"
            while name in taken:  # a module of the network itself has that name
                name += "_"
            taken.add(name)
        traced.add_submodule(name, _as_module(node, modules))
        node.op, node.target = "call_module", name
        node.meta["layer"] = name
    traced.delete_all_unused_submodules()
    traced.recompile()


def _base_name(node: fx.Node) -> str:
    if "base" in node.meta:
        return str(node.meta["base"])
    if node.op == "call_module":
        return str(node.target)
    path = node.meta.get("path", "")
    name = node.meta["op"]
    return f"{path}.{name}" if path else name


def _as_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module:
    """A module for this one call; parameters are shared with other calls of the same module."""
    if node.op != "call_module":
        return ops.Op(ops.as_function(node), node.meta["op"])
    module = copy.copy(modules[str(node.target)])
    # copy.copy shares the dict of hooks too, so a hook on one call would fire for all of them.
    for key in ("_forward_hooks", "_forward_pre_hooks"):
        object.__setattr__(module, key, copy.copy(getattr(module, key)))
    if getattr(module, "inplace", False) is True:
        object.__setattr__(module, "inplace", False)
    return module


def _check_same(expected: Any, found: Any) -> None:
    """Tracing freezes what Python decided on the example; the outputs must agree."""
    pairs = zip(float_tensors(expected), float_tensors(found), strict=True)
    for a, b in pairs:
        finite = a[a.isfinite()]
        tolerance = TRACE_TOLERANCE * float(finite.abs().max()) if finite.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True):
            raise ModelError(
                "the traced network computes something else than the original on the same input; "
                "it depends on state or randomness that a trace cannot hold"
            )


def float_tensors(value: Any) -> list[Tensor]:
    """All tensors of floats in a nest of tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in float_tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in float_tensors(item)]
    if is_dataclass(value):
        return [t for field in fields(value) for t in float_tensors(getattr(value, field.name))]
    return [value] if ops.is_float_tensor(value) else []
