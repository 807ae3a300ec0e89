"""What a network takes: one tensor, a tuple of arguments, or a dict of named ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments of a call with these inputs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def call(model: nn.Module, inputs: Any) -> Any:
    """The output of a network."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def absent(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The parameters of forward that a call with these inputs leaves at their default."""
    args, kwargs = arguments(inputs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    return {
        name: value
        for name, value in bound.arguments.items()
        if name not in given and bound.signature.parameters[name].kind not in _VARIABLE
    }


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def placeholder_values(traced: fx.GraphModule, inputs: Any) -> list[Any]:
    """The value of each placeholder of a graph, in order."""
    args, kwargs = arguments(inputs)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if isinstance(traced.graph._codegen, fx.graph._PyTreeCodeGen):
        return pytree.tree_leaves((args, kwargs))
    values = iter(args)
    return [
        kwargs[str(node.target)] if node.target in kwargs else next(values, *node.args)
        for node in placeholders
    ]


def shape_text(inputs: Any) -> str:
    """The shapes of the tensors of a call, for messages."""
    shapes = [str(tuple(t.shape)) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    return " and ".join(shapes)
