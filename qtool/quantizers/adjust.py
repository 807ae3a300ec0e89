"""Other grids for single weights and outputs of a network that is quantized already.

What depends on a grid follows it: the integers of the weight, the bias and the accumulator of every
layer that reads it, the ratios at which results are brought to it, and the borders to float. The rest
of the network stays as it is, so that this costs a fraction of quantizing it anew, and gives the same
bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from qtool.graph.fold import Folded
from qtool.graph.neighbours import source_of
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import QParams
from qtool.quantizers.grids import Dequantize
from qtool.quantizers.plan import EMBEDDING, FAKE, INTEGER, WEIGHTED, WEIGHTS_ONLY, LayerPlan, ModelPlan
from qtool.quantizers.plan.derived import (
    grid_of_value,
    grids_read,
    hands_on_grid,
    product_scale,
    value_grids,
    with_accumulator,
    with_room,
)
from qtool.quantizers.prepare import build, build_layer
from qtool.quantizers.weights import weight_integers

NewGrids = Mapping[str, QParams]
NewInputs = Mapping[tuple[str, int], QParams]
_NONE: Mapping[Any, QParams] = MappingProxyType({})


def adjusted(
    traced: fx.GraphModule,
    plan: ModelPlan,
    weights: NewGrids = _NONE,
    outputs: NewGrids = _NONE,
    inputs: NewInputs = _NONE,
) -> ModelPlan:
    """The plan with other grids for some weights, outputs and inputs, and all that follows from them.

    Args:
        traced: the float network, batch norms folded.
        plan: of the same network.
        weights: the new grids of weights, by layer; that of an embedding is its output's too.
        outputs: the new grids of outputs, by layer.
        inputs: the new grids of inputs that arrive in float, by layer and number of the input.

    Returns:
        The plan that plan_model makes for these grids. Layers that nothing changes for keep their
        LayerPlan, the same object.

    Raises:
        ValueError: if a layer has no such grid, or one of other bits or of another mode.
    """
    _check(plan, weights, outputs)
    _check_inputs(plan, inputs)
    before = value_grids(traced, plan.layers)
    handed_on = hands_on_grid(before, plan.layers)
    modules = {name: module for name, _, module in layers(traced)}
    grids: dict[fx.Node, QParams | None] = {}
    found = dict(plan.layers)
    for node in traced.graph.nodes:
        name = node.meta.get("layer")
        if name is not None:
            moved = any(grids[source] is not before[source] for source in tensor_inputs(node))
            fresh = found[name].inputs
            own = tuple(inputs.get((name, index), grid) for index, grid in enumerate(fresh))
            if any(new is not old for new, old in zip(own, fresh, strict=True)):
                found[name], moved = replace(found[name], inputs=own), True
            if moved or name in weights or name in outputs:
                new = _with_own_grids(found[name], modules[name], weights.get(name), outputs.get(name))
                found[name] = _following(new, node, modules[name], grids)
            if name in handed_on and name not in outputs:
                found[name] = replace(found[name], output=grids[tensor_inputs(node)[0]])
        grids[node] = grid_of_value(node, None if name is None else found[name], grids)
    return replace(plan, layers=found)


def _with_own_grids(
    plan: LayerPlan, module: nn.Module, weight: QParams | None, output: QParams | None
) -> LayerPlan:
    if weight is not None:
        plan = replace(plan, weight=weight, weight_q=weight_integers(module, weight))
        if plan.kind == EMBEDDING:
            return replace(plan, output=weight)
    return plan if output is None else replace(plan, output=output)


def _following(
    plan: LayerPlan, node: fx.Node, module: nn.Module, grids: Mapping[fx.Node, QParams | None]
) -> LayerPlan:
    """The plan with what depends on the grids of its inputs and of its weight."""
    if plan.kind != INTEGER:
        return plan
    read = grids_read(node, plan, grids)
    if plan.op not in WEIGHTED:
        return replace(plan, accum_scale=product_scale(read, plan.everywhere_bits))
    assert read[0] is not None
    bias = getattr(module, "bias", None)
    return with_room(with_accumulator(plan, read[0], bias), read[0], bias, module)


def _check(plan: ModelPlan, weights: NewGrids, outputs: NewGrids) -> None:
    if plan.dynamic:
        raise ValueError("the grids of a dynamic plan are found at run time; other ones need a new plan")
    has_weight, has_output = (INTEGER, WEIGHTS_ONLY, EMBEDDING), (INTEGER, FAKE)
    for what, kinds, grids in (("weight", has_weight, weights), ("output", has_output, outputs)):
        for name, new in grids.items():
            layer = plan.layers.get(name)
            held = None if layer is None or layer.kind not in kinds else getattr(layer, what)
            if held is None:
                raise ValueError(f"layer {name!r} has no {what} on a grid of its own")
            if held.spec != new.spec or held.scale.shape != new.scale.shape:
                raise ValueError(
                    f"the {what} of layer {name!r} is on a grid of {held.spec}, found one of {new.spec}; "
                    "other bits or modes need a new plan"
                )


def _check_inputs(plan: ModelPlan, inputs: NewInputs) -> None:
    for (name, index), new in inputs.items():
        fresh = plan.layers[name].inputs if name in plan.layers else ()
        held = fresh[index] if index < len(fresh) else None
        if held is None or held.spec != new.spec:
            raise ValueError(f"input {index} of layer {name!r} is not put on a grid of {new.spec}")


def changed_modules(
    network: fx.GraphModule, traced: fx.GraphModule, before: ModelPlan, after: ModelPlan
) -> dict[str, nn.Module]:
    """The modules of a quantized network that another plan of the same kinds of layers changes.

    Args:
        network: built from traced and before.
        traced: the float network, batch norms folded.
        before, after: layers that nothing changes for have the same LayerPlan, the same object.

    Returns:
        By name: new layers where the plan is another, which it is wherever an integer input's grid is; and
        new borders to float where a changed grid ends.
    """
    grids = value_grids(traced, after.layers)
    found = {}
    for name, node, module in layers(traced):
        plan = after.layers[name]
        if plan is not before.layers[name]:
            found[name] = build_layer(module, plan, grids_read(node, plan, grids), node)
    for node in network.graph.nodes:
        source = _origin(node) if node.meta["op"] == "dequantize" else None
        if source is not None and after.layers[source].output is not before.layers[source].output:
            output = after.layers[source].output
            assert output is not None
            found[str(node.target)] = Dequantize(output)
    return found


class Adjustable:
    """A quantized network whose grids can be changed.

    Args:
        folded: the float network, batch norms folded.
        plan: of the same network, static.
        device: where the network runs.

    Attributes:
        model: the network; a change replaces modules in it.

    Example:
        Doubling the range of one output::

            output = adjustable.model.plan.layers["conv1"].output
            adjustable.change(outputs={"conv1": replace(output, scale=2 * output.scale)})
    """

    def __init__(self, folded: Folded, plan: ModelPlan, device: str | torch.device = "cpu") -> None:
        self.folded = folded
        self.device = torch.device(device)
        self.model = build(folded, plan)
        if self.device.type != "cpu":
            # Layers are shared with the float network, which stays where it is.
            self.model = copy.deepcopy(self.model).to(self.device)
            self.model.plan = plan

    def change(self, weights: NewGrids = _NONE, outputs: NewGrids = _NONE) -> frozenset[str]:
        """Change the grids of some weights and outputs, as adjusted does.

        Returns:
            The names of the modules of model.network that are new.

        Raises:
            ValueError: as adjusted does; the network stays as it was.
        """
        before = self.model.plan
        self.model.plan = adjusted(self.folded.traced, before, weights, outputs)
        new = changed_modules(self.model.network, self.folded.traced, before, self.model.plan)
        for name, module in new.items():
            self._put(name, module)
        return frozenset(new)

    def _put(self, name: str, module: nn.Module) -> None:
        if self.device.type != "cpu":
            module = copy.deepcopy(module).to(self.device)
        self.model.network.set_submodule(name, module.eval().requires_grad_(False))


def _origin(border: fx.Node) -> str | None:
    """The layer that a border to float reads, seen through dropout and the like; None for no layer."""
    name = source_of(border.all_input_nodes[0]).meta.get("layer")
    return None if name is None else str(name)
