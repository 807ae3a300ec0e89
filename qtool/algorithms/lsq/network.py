"""A quantized network that is trained: its plan with weights, biases and grids that gradients move."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qtool.algorithms.lsq.grids import LearnedStep, MovingRange, TrainedGrid
from qtool.algorithms.lsq.weights import TrainedWeight
from qtool.algorithms.simulation import Simulation
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.fold import Folded, restore_layout
from qtool.graph.trace import layers
from qtool.quantizers.adjust import adjusted
from qtool.quantizers.plan import CAST, EMBEDDING, FLOAT, WEIGHTED, WEIGHTS_ONLY, LayerPlan, ModelPlan
from qtool.quantizers.plan.derived import hands_on_grid, value_grids
from qtool.quantizers.weights import fake_quantize_bias

LEARNED, EMA = "learned", "ema"
RANGES = (LEARNED, EMA)
# Operations of the steps of a recurrent layer, which the graph holds once for all steps.
OF_STEPS = frozenset({"begin_steps", "carry", "keep", "end_steps", "last_kept"})


class TrainedNetwork:
    """A network whose forward pass is that of its quantized form, with gradients.

    Batch norms are folded: their statistics are part of weights and biases, and do not move by themselves.

    Args:
        folded: the float network, which stays as it was.
        plan: of the same network; training starts from its integers and grids.
        ranges: "learned" for step sizes with gradients (LSQ); "ema" for ranges that follow what is seen, of
            activations as a moving average, of weights as their largest magnitude.
        device: where it is trained.

    Raises:
        ValueError: if it cannot be trained, see why_not.
    """

    def __init__(
        self,
        folded: Folded,
        plan: ModelPlan,
        ranges: str = LEARNED,
        device: str | torch.device = "cpu",
    ) -> None:
        reason = why_not(folded.traced, plan)
        if reason or ranges not in RANGES:
            raise ValueError(reason or f"ranges must be one of {', '.join(RANGES)}, found {ranges!r}")
        self.folded, self.plan = folded, plan
        self.device = torch.device(device)
        traced = on_device(folded.traced, self.device)
        self.weights: dict[str, TrainedWeight] = {}
        self.outputs: dict[str, TrainedGrid] = {}
        self.inputs: dict[tuple[str, int], TrainedGrid] = {}
        kind = LearnedStep if ranges == LEARNED else MovingRange
        handed_on = hands_on_grid(value_grids(folded.traced, plan.layers), plan.layers)
        for name, _, module in layers(folded.traced):
            layer = plan.layers[name]
            if layer.op in WEIGHTED:
                self.weights[name] = TrainedWeight(module, layer, ranges == EMA, self.device)
            if layer.output is not None and name not in handed_on:
                self.outputs[name] = kind(layer.output, layer.activation, layer.activation_limit, self.device)
            for index, own in enumerate(layer.inputs):
                if own is not None:
                    self.inputs[name, index] = kind(own, None, None, self.device)
        nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
        self._entry = next(node for node in traced.graph.nodes if node.op == "placeholder")
        (self._exit,) = (node for node in traced.graph.nodes if node.op == "output")
        self._simulation = Simulation(traced, nodes, plan.layers, self.weights, self.outputs, self.inputs)

    def __call__(self, x: Tensor) -> Any:
        """What the network gives for images, (N, ...)."""
        values = self._simulation.run({self._entry: x})
        return fx.node.map_arg(self._exit.args[0], values.__getitem__)

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """What is learned, by kind ("weights", "biases", "scales") and name."""
        scales = {f"weight.{n}": w.log_ratio for n, w in self.weights.items()}
        scales |= {f"output.{n}": g.log_ratio for n, g in self.outputs.items() if isinstance(g, LearnedStep)}
        scales |= {
            f"input.{n}.{index}": g.log_ratio
            for (n, index), g in self.inputs.items()
            if isinstance(g, LearnedStep)
        }
        return {
            "weights": {n: w.values for n, w in self.weights.items()},
            "biases": {n: w.shift for n, w in self.weights.items() if w.shift is not None},
            "scales": {n: s for n, s in scales.items() if s is not None},
        }

    def state(self) -> dict[str, Tensor]:
        """All that training has changed, by name; views of it, not copies."""
        found = {
            f"{kind}.{name}": tensor.detach()
            for kind, tensors in self.parameters().items()
            for name, tensor in tensors.items()
        }
        return found | {f"range.{key}": grid.range for key, grid in self._moving().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what state gave, of the same network with the same plan.

        Raises:
            ValueError: if it is of another one.
        """
        own = self.state()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError("a training state of another network")
        with torch.no_grad():
            for key, grid in self._moving().items():
                grid.follow(state[f"range.{key}"].to(self.device))
            for key, tensor in own.items():
                if not key.startswith("range."):
                    tensor.copy_(state[key])

    def _moving(self) -> dict[str, MovingRange]:
        found: dict[str, TrainedGrid] = {f"output.{name}": grid for name, grid in self.outputs.items()}
        found |= {f"input.{name}.{index}": grid for (name, index), grid in self.inputs.items()}
        return {key: grid for key, grid in found.items() if isinstance(grid, MovingRange)}

    @torch.no_grad()
    def quantized(self) -> tuple[Folded, ModelPlan]:
        """The float network and the plan that training has come to, on the CPU; build makes it a network."""
        modules, grids, biases = {}, {}, {}
        for name, weight in self.weights.items():
            tensors = {"weight": restore_layout(weight.latent().detach().cpu().clone(), weight.module)}
            bias = weight.bias()
            if bias is not None:
                tensors["bias"] = biases[name] = bias.detach().cpu().clone()
            modules[name] = with_parameters(weight.module, **tensors)
            grid = weight.grid()
            if grid is not None:
                grids[name] = grid
        traced = replace_layers(self.folded.traced, modules)
        outputs = {name: grid.found() for name, grid in self.outputs.items()}
        inputs = {key: grid.found() for key, grid in self.inputs.items()}
        plan = adjusted(traced, self.plan, grids, outputs, inputs)
        new = {
            name: replace(layer, bias=fake_quantize_bias(biases[name], layer.accum_bits))
            for name, layer in plan.layers.items()
            if layer.kind == WEIGHTS_ONLY and name in biases
        }
        return Folded(traced, self.folded.pairs), replace(plan, layers={**plan.layers, **new})


def on_device(traced: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A network on a device; a copy where that is not the CPU, as layers are shared with other networks."""
    return traced if device.type == "cpu" else copy.deepcopy(traced).to(device)


def why_not(traced: fx.GraphModule, plan: ModelPlan) -> str:
    """Why a quantized network cannot be trained, naming a layer; "" if it can.

    Args:
        traced: the float network, batch norms folded.
        plan: of the same network.
    """
    if plan.dynamic:
        return "dynamic mode finds its grids batch by batch, so that there are none to be learned"
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        return f"the network has {len(inputs)} inputs, and training gives it images alone"
    for node in traced.graph.nodes:
        if "guard" in node.meta:
            return "the network decides on values which of its layers run, and gradients do not"
        if node.meta["op"] in OF_STEPS:
            return "the network has recurrent layers, whose steps share their grids"
    for name, layer in plan.layers.items():
        reason = _why_not_layer(layer)
        if reason:
            return f"layer {name!r}: {reason}"
    if not any(layer.weight is not None or layer.output is not None for layer in plan.layers.values()):
        return "nothing in it is quantized"
    return ""


def _why_not_layer(layer: LayerPlan) -> str:
    if layer.kind == CAST or layer.float_bits is not None:
        return f"runs in a float type of {layer.float_bits} bits, in which gradients are lost"
    if layer.kind == EMBEDDING:
        return "embeddings read indices, not images"
    if layer.scale_approx_bits is not None or layer.everywhere_bits is not None:
        return "its scales are approximated by integers, which gradients cannot move"
    if layer.kind not in (FLOAT, WEIGHTS_ONLY) and layer.note:
        return f"{layer.note}, and training does not simulate an accumulator that overflows"
    return ""
