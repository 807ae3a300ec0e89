"""A part of a network with gradients: what is given to it is what it uses."""

import torch

from qtool.algorithms.simulation import Simulation
from qtool.graph.trace import layers
from qtool.quantizers.prepare import build
from qtool.quantizers.weights import weight_values


class PlannedWeight:
    """The weight of a plan, and a bias; its scale is said to have moved."""

    def __init__(self, module, plan, moved=1.0):
        self.module, self.plan, self._moved = module, plan, moved

    def weight(self):
        return weight_values(self.plan.weight, self.plan.weight_q)

    def bias(self):
        return self.module.bias

    def moved(self):
        return self._moved


class PlannedGrid:
    """The grid of a plan, with torch's own operations."""

    def __init__(self, qparams, activation):
        self.qparams, self.activation = qparams, activation
        self.low, self.high = (
            end - float(qparams.zero_point) for end in (qparams.spec.quant_min, qparams.spec.quant_max)
        )

    def __call__(self, x, masks=None):
        limits = {None: (None, None), "relu": (0, None), "relu6": (0, 6)}[self.activation]
        if limits != (None, None):
            x = x.clamp(*limits)
        return (x / self.qparams.scale).round().clamp(self.low, self.high) * self.qparams.scale

    def added(self, tensors, masks=None):
        scale = self.qparams.scale
        return self(sum((x / scale).round() * scale for x in tensors))

    def moved(self):
        return 1.0


def _simulation(folded, plan, moved=1.0):
    traced = folded.traced
    modules = {name: module for name, _, module in layers(traced)}
    weights = {n: PlannedWeight(modules[n], p, moved) for n, p in plan.layers.items() if p.weight is not None}
    outputs = {n: PlannedGrid(p.output, p.activation) for n, p in plan.layers.items() if p.output is not None}
    fresh = {
        (n, index): PlannedGrid(own, None)
        for n, p in plan.layers.items()
        for index, own in enumerate(p.inputs)
        if own is not None
    }
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    return Simulation(traced, nodes, plan.layers, weights, outputs, fresh)


def _run(simulation, x):
    (entry,) = (n for n in simulation.traced.graph.nodes if n.op == "placeholder")
    return simulation.run({entry: x})


def test_with_the_weights_and_grids_of_a_plan_it_gives_what_the_quantized_network_gives(
    tiny_net, tiny_batches, planned_w4
):
    folded, plan = planned_w4(tiny_net, tiny_batches, mode="asym_u", bits_activations=4)
    values = _run(_simulation(folded, plan), tiny_batches[0])
    quantized = build(folded, plan)
    expected = quantized.integers(tiny_batches[0])
    for name, node, _ in layers(folded.traced):
        output = plan.layers[name].output
        if output is None:
            continue
        found = (values[node] / output.scale).round() + output.zero_point
        assert float((found == expected[name]).float().mean()) > 0.99, name


def test_biases_are_rounded_to_steps_that_follow_the_scale_of_the_weight(tiny_net, tiny_batches, planned_w4):
    """Steps that are said to be a million times as wide take every bias to zero."""
    folded, plan = planned_w4(tiny_net, tiny_batches, mode="asym_u", per_channel_weights=True)
    (node,) = (node for name, node, _ in layers(folded.traced) if name == "conv1")
    plain, wide = (_run(_simulation(folded, plan, m), tiny_batches[0])[node] for m in (1.0, 1e6))
    assert not torch.equal(plain, wide)
    module = folded.traced.get_submodule("conv1")
    before, module.bias = module.bias, torch.nn.Parameter(torch.zeros(8))
    assert torch.equal(_run(_simulation(folded, plan), tiny_batches[0])[node], wide)
    module.bias = before
