"""Parameters that a network uses in functions: as constants, or as layers with weights of their own.

`F.linear(x, self.weight)` becomes a linear layer, and whatever is computed from parameters alone is
computed once.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.graph import ops
from qtool.graph.attention import linear


def fold_constants(traced: fx.GraphModule) -> None:
    """Replace what depends on no input by its value, in place; needs meta["value"] of every node."""
    values: dict[fx.Node, Any] = {}
    interpreter = fx.Interpreter(traced)
    interpreter.env = values
    for node in list(traced.graph.nodes):
        sources = node.all_input_nodes
        constant = bool(sources) and all(source in values for source in sources)
        if node.op == "get_attr" or (constant and _is_computed(node)):
            with torch.no_grad():
                values[node] = interpreter.run_node(node)
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, Tensor) or node.users.keys() <= values.keys():
            continue
        replacement = add_constant(traced, node, value)
        node.replace_all_uses_with(replacement)
    traced.graph.eliminate_dead_code()


def _is_computed(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method", "call_module") and not node.is_impure()


def add_constant(traced: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    """A get_attr node of a new buffer, in front of node."""
    number = 0
    while hasattr(traced, f"_constant{number}"):
        number += 1
    traced.register_buffer(f"_constant{number}", value.detach().clone())
    with traced.graph.inserting_before(node):
        created = traced.graph.get_attr(f"_constant{number}")
    created.meta.update(path=node.meta.get("path", ""), value=value.to("meta"))
    return created


def make_layers(traced: fx.GraphModule) -> None:
    """Turn functions of a parameter, such as F.linear and F.conv2d, into layers, in place.

    A layer takes its name from its weight: `encoder.in_proj_weight` gives `encoder.in_proj`, and
    `encoder.qkv.weight` gives `encoder.qkv`.
    """
    for number, node in enumerate(list(traced.graph.nodes)):
        make = _MAKERS.get(ops.function_name(node.target)) if node.op == "call_function" else None
        if make is None or not _is_torch_function(node.target):
            continue
        settings = _bind(node)
        if settings is None:
            continue
        x, weight, bias = settings.pop("input"), settings.pop("weight"), settings.pop("bias", None)
        if not all(n is None or _is_parameter(n) for n in (weight, bias)) or not isinstance(x, fx.Node):
            continue
        parameters = [None if n is None else _attribute(traced, str(n.target)) for n in (weight, bias)]
        layer = make(*parameters, **settings)
        if layer is None:
            continue
        name = f"_layer{number}"
        traced.add_submodule(name, layer.eval())
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(name, (x,))
        call.meta = {**node.meta, "base": _layer_name(str(weight.target), node, layer)}
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()


def _is_torch_function(target: object) -> bool:
    """Whether this is torch's own function, rather than one of a network with the same name."""
    return (getattr(target, "__module__", None) or "").startswith("torch")


def _is_parameter(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _attribute(module: nn.Module, path: str) -> Tensor:
    value = ops.attribute(module, path)
    assert isinstance(value, Tensor)
    return value


def _layer_name(parameter: str, node: fx.Node, layer: nn.Module) -> str:
    if parameter.startswith("_constant"):
        path = node.meta.get("path", "")
        op = ops.module_op(layer)
        return f"{path}.{op}" if path else op
    name = parameter.removesuffix("weight").rstrip("._") or ops.module_op(layer)
    return f"{name}_" if keyword.iskeyword(name.rpartition(".")[2]) else name


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_SIGNATURES = {
    "linear": ("input", "weight", "bias"),
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _CONV_TRANSPOSE for n in (1, 2, 3)},
}


def _bind(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a call by name."""
    signature = _SIGNATURES[ops.function_name(node.target)]
    found = {**dict(zip(signature, node.args, strict=False)), **node.kwargs}
    known = len(node.args) <= len(signature) and found.keys() <= set(signature)
    return found if known and {"input", "weight"} <= found.keys() else None


def _conv(weight: Tensor, bias: Tensor | None, groups: int = 1, **settings: Any) -> nn.Module | None:
    cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
    channels = (weight.shape[1] * groups, weight.shape[0])
    return _of_parameters(cls, channels, weight, bias, groups, settings)


def _conv_transpose(
    weight: Tensor, bias: Tensor | None, groups: int = 1, **settings: Any
) -> nn.Module | None:
    cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[weight.dim() - 3]
    channels = (weight.shape[0], weight.shape[1] * groups)
    return _of_parameters(cls, channels, weight, bias, groups, settings)


def _of_parameters(
    cls: Any,
    channels: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    settings: dict[str, Any],
) -> nn.Module | None:
    if not all(isinstance(v, (int, str)) or _all_int(v) for v in settings.values()):
        return None
    num_dims = weight.dim() - 2
    settings = {
        key: tuple(value) * (num_dims if len(value) == 1 else 1)
        if isinstance(value, (list, tuple))
        else value
        for key, value in settings.items()
    }
    layer = cls(
        *channels, tuple(weight.shape[2:]), groups=groups, bias=bias is not None, device="meta", **settings
    )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer  # type: ignore[no-any-return]


def _all_int(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value)


_MAKERS: dict[str, Callable[..., nn.Module | None]] = {
    "linear": linear,
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
}
