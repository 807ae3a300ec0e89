"""Other parameters for single layers of a graph; the layers that were there stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from qtool.graph.trace import copy_graph


def with_parameters(layer: nn.Module, **tensors: Tensor) -> nn.Module:
    """A copy of a layer that shares all but the named parameters (such as weight=..., bias=...)."""
    copied: Any = copy.copy(layer)
    copied._parameters = dict(layer._parameters)
    for name, tensor in tensors.items():
        copied._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return copied  # type: ignore[no-any-return]


def replace_layers(traced: fx.GraphModule, new: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy of a graph with other modules for some layers, by name."""
    copied = copy_graph(traced)
    for name, module in new.items():
        copied.set_submodule(name, module.eval().requires_grad_(False))
    return copied
