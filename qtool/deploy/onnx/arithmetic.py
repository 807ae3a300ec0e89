"""How sums, products, means and norms are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qtool.deploy.onnx.shapes import reshape
from qtool.deploy.onnx.site import Rule, Site
from qtool.deploy.onnx.writer import NotInOnnx


def _binary(kind: str) -> Rule:
    def rule(site: Site) -> str:
        if site.setting("rounding_mode", 9) is not None or site.setting("alpha", 9, 1) != 1:
            raise NotInOnnx("a division that rounds, or a sum with a factor")
        first, second = site.tensor(0), site.tensor(1, "other")
        return site.op(kind, first, second)

    return rule


def _cat(site: Site) -> str:
    sequence: Any = site.node.args[0] if site.node.args else site.node.kwargs["tensors"]
    return site.op("Concat", *(site.name_of(node) for node in sequence), axis=site.setting("dim", 1, 0))


def _stack(site: Site) -> str:
    sequence: Any = site.node.args[0] if site.node.args else site.node.kwargs["tensors"]
    dim = site.setting("dim", 1, 0)
    axis = site.w.numbers([dim])
    parts = [
        site.op("Unsqueeze", site.name_of(node), axis, name=f"{site.name}_part{index}")
        for index, node in enumerate(sequence)
    ]
    return site.op("Concat", *parts, axis=dim)


def _reduced(kind: str) -> Rule:
    def rule(site: Site) -> str:
        dims = site.setting("dim", 1)
        axes = list(range(len(site.sizes_read()))) if dims is None else dims
        axes = [axes] if isinstance(axes, int) else list(axes)
        keepdim = bool(site.setting("keepdim", 2, False))
        return site.op(kind, site.tensor(), site.w.numbers(axes), keepdims=int(keepdim))

    return rule


def _einsum(site: Site) -> str:
    equation = getattr(getattr(site.module, "function", None), "equation", None)
    if equation is None:
        raise NotInOnnx("an einsum of more than two tensors")
    return site.op("Einsum", *site.tensors(), equation=equation)


def _layer_norm(site: Site) -> str:
    shape = site.setting("normalized_shape", 1)
    weight, bias, eps = (_parameter(site, *where) for where in (("weight", 2), ("bias", 3), ("eps", 4)))
    ones = torch.ones(tuple(shape)) if weight is None else weight
    inputs = [site.tensor(), site.w.tensor(ones, f"{site.name}.weight")]
    inputs += [] if bias is None else [site.w.tensor(bias, f"{site.name}.bias")]
    epsilon = 1e-5 if eps is None else eps
    return site.op("LayerNormalization", *inputs, axis=-len(tuple(shape)), epsilon=float(epsilon))


def _parameter(site: Site, key: str, position: int) -> Any:
    """A parameter of the module, or a constant argument of the function."""
    if site.module is not None and hasattr(site.module, key):
        return getattr(site.module, key)
    value = site.node.kwargs.get(key, site.node.args[position] if position < len(site.node.args) else None)
    if isinstance(value, fx.Node):
        constant = site.shapes.constant(value)
        if constant is None:
            raise NotInOnnx(f"its {key} is computed from the image")
        return constant
    return value


def _batch_norm(site: Site) -> str:
    module: Any = site.module
    mean, var = module.running_mean, module.running_var
    if mean is None:
        raise NotInOnnx("a batch norm without running statistics")
    scale = torch.ones_like(mean) if module.weight is None else module.weight
    shift = torch.zeros_like(mean) if module.bias is None else module.bias
    named = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": var}
    inputs = [site.w.tensor(value, f"{site.name}.{key}") for key, value in named.items()]
    return site.op("BatchNormalization", site.tensor(), *inputs, epsilon=float(module.eps))


def _group_norm(site: Site) -> str:
    """Each group's values are normalized as a layer norm does it, then scaled channel by channel."""
    groups = site.setting("num_groups", 1)
    weight, bias, eps = (_parameter(site, *where) for where in (("weight", 2), ("bias", 3), ("eps", 4)))
    sizes = site.sizes_read()
    ones = site.w.tensor(torch.ones(groups), f"{site.name}_ones")
    zeros = site.w.tensor(torch.zeros(groups), f"{site.name}_zeros")
    apart = site.op("Reshape", site.tensor(), site.w.numbers([0, groups, -1]), name=f"{site.name}_groups")
    normal = site.op(
        "InstanceNormalization", apart, ones, zeros, name=f"{site.name}_normal", epsilon=float(eps or 1e-5)
    )
    if weight is None:
        return reshape(site.w, normal, sizes, site.name)
    together = reshape(site.w, normal, sizes, f"{site.name}_together")
    trailing = [1] * (len(sizes) - 2)
    scale = site.w.tensor(weight.reshape(-1, *trailing), f"{site.name}.weight")
    shift = site.w.tensor(bias.reshape(-1, *trailing), f"{site.name}.bias")
    return site.op("Add", site.op("Mul", together, scale, name=f"{site.name}_scaled"), shift)


ARITHMETIC: dict[str, Rule] = {
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
    "matmul": _binary("MatMul"),
    "maximum": _binary("Max"),
    "minimum": _binary("Min"),
    "einsum": _einsum,
    "cat": _cat,
    "stack": _stack,
    "mean": _reduced("ReduceMean"),
    "sum": _reduced("ReduceSum"),
    "amax": _reduced("ReduceMax"),
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
}
