"""From the simulated network to one in float with quantize and dequantize operations.

The graph is the simulation's; each module gives way to one that takes and gives floats on the same grids.
Layers keep their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.pt2e.modules import (
    Activation,
    Computed,
    InSteps,
    NotInProgram,
    OnGrid,
    Sum,
    Table,
    Weight,
    Weighted,
)
from qtool.errors import ConfigError
from qtool.graph.fold import swap_channels
from qtool.graph.trace import copy_graph, tensor_inputs
from qtool.quantizers import plan as plans
from qtool.quantizers.grids import Dequantize, Quantize
from qtool.quantizers.modules import FakeQuantize, QuantProduct
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.weighted import QuantWeighted
from qtool.quantizers.weighted import weighted_function as function_of

# Programs compute sums in float32, which has no width to saturate at.
ACCUM_BITS = 32


def lower(model: QuantizedModel, flag: str) -> fx.GraphModule:
    """The network between quantize and dequantize operations.

    Args:
        model: a static quantized network.
        flag: that asks for it, for messages.

    Raises:
        ConfigError: naming the first layer that has no such form, why, and what would work.
    """
    network = copy_graph(model.network)
    modules = dict(model.network.named_modules())
    for node in network.graph.nodes:
        name = str(node.target)
        if node.op != "call_module":
            continue
        plan = model.plan.layers.get(node.meta.get("layer", ""))
        try:
            network.set_submodule(name, _lowered(modules[name], plan, node))
        except NotInProgram as reason:
            raise ConfigError(f"{flag}: layer {name!r}: {reason}") from reason
    network.recompile()
    return network.eval()


def _lowered(module: nn.Module, plan: LayerPlan | None, node: fx.Node) -> nn.Module:
    """What takes the place of a module of the simulation.

    Raises:
        NotInProgram: if nothing can.
    """
    if isinstance(module, Quantize):
        return OnGrid(module.qparams)
    if isinstance(module, Dequantize):
        return nn.Identity()
    if plan is None or plan.kind not in _RULES:
        return module  # computes in float
    return _RULES[plan.kind](module, plan, node)


def _integer(module: nn.Module, plan: LayerPlan, node: fx.Node) -> nn.Module:
    """A layer that computes on integers."""
    if plan.scale_approx_bits is not None or plan.everywhere_bits is not None:
        raise NotInProgram(
            "multiplies by approximated scales, and programs by exact ones; quantize without "
            "--qe-scale-approx-bits"
        )
    if plan.accum_bits < ACCUM_BITS and (plan.note or not isinstance(module, QuantWeighted)):
        raise NotInProgram(
            f"its sums can exceed {plan.accum_bits} bits, where the simulation saturates; quantize with "
            f"--qe-bits-accum {ACCUM_BITS}"
        )
    assert plan.output is not None
    activation, output = _activation(plan), OnGrid(plan.output)
    if isinstance(module, QuantWeighted):
        return _weighted(module, plan, activation, output)
    if plan.op == "add":
        rounded = [nn.Identity() if plan.sum_once else InSteps(plan.output) for _ in tensor_inputs(node)]
        return Sum(rounded, activation, output)
    if isinstance(module, QuantProduct):
        return Computed(module.function, activation, output)
    return Computed(_joined, activation, output)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), dim)


def _weighted(module: QuantWeighted, plan: LayerPlan, activation: Activation, output: OnGrid) -> nn.Module:
    assert plan.weight is not None and plan.weight_q is not None
    bias = None
    if plan.bias_q is not None:
        assert plan.accum_scale is not None
        bias = (plan.bias_q.double() * plan.accum_scale.double().flatten()).float()
    weight = Weight(plan.weight, plan.weight_q)
    in_layout = _layout(plan, module.geometry.get("groups", 1))
    return Weighted(module.compute, weight, in_layout, bias, activation, output)


def _weights_only(module: nn.Module, plan: LayerPlan, _node: fx.Node) -> nn.Module:
    """A layer whose weights alone are integers."""
    assert plan.weight is not None and plan.weight_q is not None
    layer: Any = module[0] if isinstance(module, nn.Sequential) else module
    weight = Weight(plan.weight, plan.weight_q)
    in_layout = _layout(plan, getattr(layer, "groups", 1))
    return Weighted(function_of(layer), weight, in_layout, layer.bias, _activation(plan), None)


def _activation(plan: LayerPlan) -> Activation:
    return Activation(plan.activation, plan.activation_limit)


def _layout(plan: LayerPlan, groups: int) -> Callable[[Tensor], Tensor]:
    """From output channels first to the layout of the layer."""
    return partial(swap_channels, groups=groups) if plan.op == "conv_transpose" else _same


def _same(weight: Tensor) -> Tensor:
    return weight


def _fake(module: nn.Module, plan: LayerPlan, _node: fx.Node) -> nn.Module:
    """A layer that computes in float, and whose output is on a grid."""
    assert plan.output is not None and isinstance(module, FakeQuantize)
    return Computed(module.operation, _activation(plan), OnGrid(plan.output))


def _embedding(_module: nn.Module, plan: LayerPlan, _node: fx.Node) -> nn.Module:
    assert plan.weight is not None and plan.weight_q is not None
    return Table(Weight(plan.weight, plan.weight_q))


_RULES: dict[str, Callable[[nn.Module, LayerPlan, fx.Node], nn.Module]] = {
    plans.INTEGER: _integer,
    plans.FAKE: _fake,
    plans.WEIGHTS_ONLY: _weights_only,
    plans.EMBEDDING: _embedding,
}
