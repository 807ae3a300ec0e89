"""Networks as graphs: by torch.fx's symbolic trace, by torch.export where that cannot, or by paths.

All give an fx.GraphModule whose nodes call torch's own modules by their path, and functions with
`meta["path"]`, the path of the module that they came from. So the layers of a network have the same
names either way. No operation of it is in place.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qtool.errors import ModelError
from qtool.graph.control import steer
from qtool.graph.examples import absent, arguments
from qtool.graph.paths import by_paths
from qtool.graph.pure import make_pure
from qtool.graph.recurrent import Recurrent
from qtool.graph.tracer import LayerTracer


def capture(root: nn.Module, example: Any) -> fx.GraphModule:
    """The graph of a network.

    Raises:
        ModelError: if there is no way; the message names the line of the network's code.
    """
    # torch.export cannot take the loops of recurrent modules.
    has_loops = any(isinstance(module, Recurrent) for module in root.modules())
    ways = (symbolic, by_paths) if has_loops else (symbolic, exported, by_paths)
    for way in ways:
        try:
            return way(root, example)
        except Exception as error:
            last = error
    why = str(last) if isinstance(last, ModelError) else one_line(last)
    raise ModelError(f"the network cannot be captured: {why}") from last


def symbolic(root: nn.Module, example: Any) -> fx.GraphModule:
    """The graph that torch.fx finds without running the network."""
    graph = LayerTracer(absent(root, example)).trace(root)
    make_pure(graph, dict(root.named_modules(remove_duplicate=False)))
    steer(graph)
    return fx.GraphModule(root, graph, class_name=type(root).__name__)


def exported(root: nn.Module, example: Any) -> fx.GraphModule:
    """The graph that torch.export finds by running the network on an example.

    The first axis of every input may have another size later; all other sizes are the example's.
    """
    args, kwargs = pytree.tree_map(_at_least_two, arguments(example))
    names = inspect.signature(root.forward).bind(*args, **kwargs).arguments
    free = {name: pytree.tree_map(_first_axis_free, value) for name, value in names.items()}
    with _quiet():
        program = torch.export.export(root, args, kwargs, dynamic_shapes=free, strict=False)
    traced = program.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and str(getattr(node.target, "__name__", "")).startswith("_assert"):
            traced.graph.erase_node(node)
    _collapse_modules(traced.graph, root)
    make_pure(traced.graph, dict(root.named_modules(remove_duplicate=False)))
    return fx.GraphModule(_Both(root, traced), traced.graph, class_name=type(root).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal from torch.export, which logs and prints the graph that it fails on."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(before)


def _at_least_two(value: Any) -> Any:
    """An axis of size 1 would stay 1 for ever."""
    is_single = isinstance(value, Tensor) and value.dim() and value.shape[0] == 1
    return torch.cat([value, value]) if is_single else value


def _first_axis_free(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


class _Both(nn.Module):
    """The modules and parameters of a network, and the constants that its exported form has besides."""

    def __init__(self, root: nn.Module, traced: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in root.__dict__.items() if k not in self.__dict__})
        for kind in ("_parameters", "_buffers", "_modules"):
            getattr(self, kind).update({**getattr(traced, kind), **getattr(root, kind)})
        # Tensors that belong to no module, such as a mask that forward takes from a global name.
        constants = {k: v for k, v in traced.__dict__.items() if isinstance(v, Tensor)}
        self._buffers.update({k: v for k, v in constants.items() if not hasattr(root, k)})


def _collapse_modules(graph: fx.Graph, root: nn.Module) -> None:
    """Put back the calls of torch's own modules, in place of the operators that they consist of."""
    modules = dict(root.named_modules(remove_duplicate=False))
    calls: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        stack = [
            (k, path) for k, (path, _) in node.meta.get("nn_module_stack", {}).items() if path in modules
        ]
        node.meta["path"] = stack[-1][1] if stack else ""
        if node.op not in ("call_function", "call_method"):
            continue
        leaf = next(((key, path) for key, path in stack if path and _is_leaf(modules[path])), None)
        if leaf is not None:
            calls.setdefault(leaf[0], (leaf[1], []))[1].append(node)
    for path, nodes in calls.values():
        _collapse(graph, path, nodes)


def _is_leaf(module: nn.Module) -> bool:
    return LayerTracer({}).is_leaf_module(module, "")


def _collapse(graph: fx.Graph, path: str, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    inputs = [n for n in read if n.op != "get_attr" and isinstance(n.meta.get("val"), Tensor)]
    results = [node for node in nodes if not node.users.keys() <= inside]
    if len(inputs) != 1 or len(results) != 1:
        return  # its operators stay
    with graph.inserting_before(nodes[0]):
        call = graph.create_node("call_module", path, (inputs[0],))
    call.meta.update(path=path, val=results[0].meta["val"])
    results[0].replace_all_uses_with(call)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)


def one_line(error: BaseException, max_chars: int = 300) -> str:
    """An error as one line of text, cut to so many characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:max_chars]
