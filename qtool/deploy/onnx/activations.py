"""How operations on each value alone are written, and the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qtool.deploy.onnx.site import Rule, Site
from qtool.deploy.onnx.writer import NotInOnnx
from qtool.graph.capped import limit_of


def _plain(kind: str) -> Rule:
    """An operation without settings."""
    return lambda site: site.op(kind, site.tensor())


def _relu6(site: Site) -> str:
    limit = limit_of(site.module)
    if limit is None:
        return site.op("Clip", site.tensor(), site.w.number(0.0), site.w.number(6.0))
    positive = site.op("Relu", site.tensor(), name=f"{site.name}_positive")
    return site.op("Min", positive, site.w.tensor(limit, f"{site.name}_limit"))


def _clamp(site: Site) -> str:
    module = site.module
    if isinstance(module, nn.Hardtanh):
        low, high = module.min_val, module.max_val
    else:
        is_hardtanh = site.node.meta["op"] == "hardtanh"
        low = site.setting("min_val" if is_hardtanh else "min", 1, -1.0 if is_hardtanh else None)
        high = site.setting("max_val" if is_hardtanh else "max", 2, 1.0 if is_hardtanh else None)
    ends = ["" if end is None else site.w.number(end) for end in (low, high)]
    return site.op("Clip", site.tensor(), *ends)


def _with(kind: str, attribute: str, setting: str, default: float) -> Rule:
    """An operation with one setting, under ONNX's name and torch's."""

    def rule(site: Site) -> str:
        given: dict[str, Any] = {attribute: float(site.setting(setting, 1, default))}
        return site.op(kind, site.tensor(), **given)

    return rule


def _prelu(site: Site) -> str:
    if site.module is None or not isinstance(site.module, nn.PReLU):
        raise NotInOnnx("prelu as a function; nn.PReLU is written")
    slope = site.module.weight.detach().reshape(-1, *[1] * (len(site.sizes()) - 2))
    return site.op("PRelu", site.tensor(), site.w.tensor(slope, f"{site.name}_slope"))


def _silu(site: Site) -> str:
    x = site.tensor()
    return site.op("Mul", x, site.op("Sigmoid", x, name=f"{site.name}_sigmoid"))


def _hardsigmoid(site: Site) -> str:
    return site.op("HardSigmoid", site.tensor(), alpha=1 / 6, beta=0.5)


def _softplus(site: Site) -> str:
    if site.setting("beta", 1, 1) != 1:
        raise NotInOnnx("a softplus with a beta other than 1")
    return site.op("Softplus", site.tensor())


def _gelu(site: Site) -> str:
    x, approximate = site.tensor(), site.setting("approximate", 1, "none")
    if site.w.opset >= 20:
        return site.op("Gelu", x, approximate=approximate)
    if approximate != "none":
        raise NotInOnnx(f"a GELU by tanh, which opset {site.w.opset} lacks; --opset 20 or newer")
    scaled = site.op("Mul", x, site.w.number(math.sqrt(0.5)), name=f"{site.name}_scaled")
    erf = site.op("Erf", scaled, name=f"{site.name}_erf")
    share = site.op("Add", erf, site.w.number(1.0), name=f"{site.name}_share")
    half = site.op("Mul", x, site.w.number(0.5), name=f"{site.name}_half")
    return site.op("Mul", half, share)


def _softmax(site: Site) -> str:
    """The softmax; a mask is added to its input, or puts -inf in its place."""
    dim: Any = site.setting("dim", 1, None)
    x = site.tensor()
    if site.node.meta["op"] != "softmax" or not _is_masked(site):
        return site.op("LogSoftmax" if site.node.meta["op"] == "log_softmax" else "Softmax", x, axis=dim)
    mask = site.shapes.constant(site.node.args[1]) if len(site.node.args) > 1 else None  # type: ignore[arg-type]
    if mask is None or len(site.node.all_input_nodes) > 2 or site.setting("is_causal", 3, False):
        raise NotInOnnx("a softmax with a mask that is not fixed")
    added = torch.zeros(mask.shape).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
    if bool(added.isneginf().all(-1).any()):
        raise NotInOnnx("a softmax of which the mask leaves out a whole row")
    masked = site.op("Add", x, site.w.tensor(added, f"{site.name}_mask"), name=f"{site.name}_masked")
    return site.op("Softmax", masked, axis=-1)


def _is_masked(site: Site) -> bool:
    return getattr(getattr(site.module, "function", None), "__name__", "") == "masked_softmax"


def _pow(site: Site) -> str:
    return site.op("Pow", site.tensor(), site.tensor(1, "exponent"))


def _rsqrt(site: Site) -> str:
    return site.op("Reciprocal", site.op("Sqrt", site.tensor(), name=f"{site.name}_root"))


ACTIVATIONS: dict[str, Rule] = {
    "relu": _plain("Relu"),
    "relu6": _relu6,
    "hardtanh": _clamp,
    "clamp": _clamp,
    "leaky_relu": _with("LeakyRelu", "alpha", "negative_slope", 0.01),
    "elu": _with("Elu", "alpha", "alpha", 1.0),
    "celu": _with("Celu", "alpha", "alpha", 1.0),
    "selu": _plain("Selu"),
    "prelu": _prelu,
    "sigmoid": _plain("Sigmoid"),
    "tanh": _plain("Tanh"),
    "softsign": _plain("Softsign"),
    "hardswish": _plain("HardSwish"),
    "hardsigmoid": _hardsigmoid,
    "silu": _silu,
    "mish": _plain("Mish"),
    "gelu": _gelu,
    "softplus": _softplus,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "abs": _plain("Abs"),
    "neg": _plain("Neg"),
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "rsqrt": _rsqrt,
    "erf": _plain("Erf"),
    "pow": _pow,
}
