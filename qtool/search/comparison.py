"""A float network and its quantized version on the same images, layer by layer.

Both run side by side, batch after batch: what is kept of a batch is sums. Cumulative is what a layer gives in
the quantized network, behind everything that was rounded in front of it; local is what it gives for the
float network's values, rounded to the grids on which it reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtool.graph.fold import Folded, output_channels_first
from qtool.graph.trace import layers, tensor_inputs
from qtool.graph.walk import Walk
from qtool.numerics.affine import along_axis, dequantize_centered
from qtool.numerics.codes import CodeCounts, CodeUse
from qtool.numerics.logits import logits_of
from qtool.numerics.metrics import ratio_db, sqnr_db
from qtool.quantizers.limits import OutputClamp
from qtool.quantizers.plan import FAKE, IDENTITY, INTEGER, LayerPlan
from qtool.quantizers.plan.derived import value_grids
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.weights import weight_values
from qtool.search.groups import QUANTIZED, Group, layer_groups, source_layer
from qtool.search.sensitivity.points import Point
from qtool.search.sensitivity.rounded import RoundedLayer


@dataclass(frozen=True)
class LayerComparison:
    """How one layer's output differs.

    Args:
        layer: its name.
        kind: what became of it, a constant of quantizers.plan.
        weight_bits, output_bits: of its grids; None for float.
        sqnr_db: of its output in the quantized network, against the float network's.
        local_sqnr_db: of its output for float inputs; None for a layer in float.
        weight_sqnr_db: of its weight; None for one in float.
        weight_steps: how far a weight is from its integer, in steps of the grid, the median of all.
        codes: how its grid is used; None without a grid.
    """

    layer: str
    kind: str
    weight_bits: int | None
    output_bits: int | None
    sqnr_db: float
    local_sqnr_db: float | None
    weight_sqnr_db: float | None
    weight_steps: float | None
    codes: CodeUse | None


class Comparison:
    """Adds up the differences of two networks over batches.

    Args:
        folded: the float network, batch norms folded.
        model: what was made from it, with a static plan.

    Raises:
        ValueError: if the plan is of another network, or dynamic.
    """

    def __init__(self, folded: Folded, model: QuantizedModel) -> None:
        traced, plan = folded.traced, model.plan
        names = [name for name, _, _ in layers(traced)]
        if plan.dynamic:
            raise ValueError("a network in dynamic mode has no grids of its own to compare on")
        if set(names) != set(plan.layers):
            strangers = sorted(set(names) ^ set(plan.layers))
            raise ValueError(
                f"they are not of the same network: only one of them has a layer {strangers[0]!r}"
            )
        self.network, self.model = traced, model
        self._grids = value_grids(traced, plan.layers)
        self._nodes = {name: node for name, node, _ in layers(traced)}
        self._there = {n.meta["layer"]: n for n in model.network.graph.nodes if "layer" in n.meta}
        groups = {name: group for group in layer_groups(traced, plan) for name in group.layers}
        self._layers = [
            _Layer(traced, name, plan.layers[name], self._rounded(name, groups), self._end(name))
            for name in names
            if plan.layers[name].kind != IDENTITY and self._is_float_tensor(name)
        ]

    def _rounded(self, name: str, groups: dict[str, Group]) -> RoundedLayer | None:
        plan = self.model.plan
        if plan.layers[name].kind not in QUANTIZED:
            return None
        return RoundedLayer(self.network, self.network, name, Point(groups[name], plan), self._grids)

    def _end(self, name: str) -> fx.Node:
        """The node of the float network whose value a layer computes: its own, or its activation's."""
        plans = self.model.plan.layers
        taken = [
            node
            for other, node in self._nodes.items()
            if plans[other].kind == IDENTITY and source_layer(tensor_inputs(node)[0], plans) == name
        ]
        return taken[-1] if taken else self._nodes[name]

    def _is_float_tensor(self, name: str) -> bool:
        value = self._nodes[name].meta["value"]
        return isinstance(value, Tensor) and value.is_floating_point()

    @torch.no_grad()
    def add(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch.

        Returns:
            The logits of the float network and of the quantized one, (N, C).
        """
        here = Walk(self.network, [images], self._read_late())
        there = Walk(self.model.network, [images])
        for layer in self._layers:
            node = self._there[layer.name]
            here.past_all_before(layer.node)
            local = layer.local(here.alive()[0])
            here.past(layer.end)
            there.past(node)
            layer.add(here.values(layer.end)[0], there.values(node)[0], local)
        return logits_of(_output(here)), logits_of(_output(there))

    def _read_late(self) -> set[fx.Node]:
        """What a layer reads that the walk to the end of another, which stands around it, may have freed."""
        place = {node: number for number, node in enumerate(self.network.graph.nodes)}
        reached, found = -1, set()
        for layer in self._layers:
            if place[layer.node] < reached:
                found |= set(layer.node.all_input_nodes)
            reached = max(reached, place[layer.end])
        return found

    def layers(self) -> list[LayerComparison]:
        """What was found, in the order of execution."""
        return [layer.summary() for layer in self._layers]


def _output(walk: Walk) -> Any:
    """What the network gives, which has run up to there."""
    (node,) = (n for n in walk.network.graph.nodes if n.op == "output")
    walk.before(node)
    ((args, _),) = walk.arguments(node)
    return walk.network.graph.process_outputs(args[0])


class _Layer:
    """The sums of one layer."""

    def __init__(
        self, traced: fx.GraphModule, name: str, plan: LayerPlan, rounded: RoundedLayer | None, end: fx.Node
    ) -> None:
        self.name, self.plan, self.rounded, self.end = name, plan, rounded, end
        self.node = next(node for other, node, _ in layers(traced) if other == name)
        self.signal = self.noise = self.local_noise = 0.0
        self.weight = _of_weight(traced, name, plan)
        self.codes: CodeCounts | None = None
        if plan.output is not None and plan.kind in (INTEGER, FAKE):
            clamp = OutputClamp(plan.output, plan.activation, plan.activation_limit)
            self.codes = CodeCounts(plan.output, clamp.low, clamp.high)

    def local(self, values: dict[fx.Node, Any]) -> Tensor | None:
        """What the rounded layer gives for the float network's values."""
        return None if self.rounded is None else self.rounded.output(values)

    def add(self, expected: Tensor, found: Tensor, local: Tensor | None) -> None:
        if self.codes is not None:
            self.codes.add(expected, found)
        grid = self.plan.output
        x = found if grid is None else dequantize_centered(found, grid)
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected - x).double().square().sum())
        if local is not None:
            self.local_noise += float((expected - local).double().square().sum())

    def summary(self) -> LayerComparison:
        plan = self.plan
        return LayerComparison(
            self.name,
            plan.kind,
            None if plan.weight is None else plan.weight.spec.num_bits,
            None if plan.output is None else plan.output.spec.num_bits,
            ratio_db(self.signal, self.noise),
            None if self.rounded is None else ratio_db(self.signal, self.local_noise),
            *self.weight,
            None if self.codes is None else self.codes.use(),
        )


def _of_weight(traced: fx.GraphModule, name: str, plan: LayerPlan) -> tuple[float | None, float | None]:
    """The SQNR of a layer's weight, and the median distance from its integers in steps."""
    if plan.weight is None or plan.weight_q is None:
        return None, None
    weight = output_channels_first(traced.get_submodule(name))
    rounded = weight_values(plan.weight, plan.weight_q)
    steps = (weight - rounded).abs() / along_axis(plan.weight.scale, plan.weight.spec.axis, weight.dim())
    return sqnr_db(weight, rounded), float(steps.median())


@dataclass(frozen=True)
class Flip:
    """An image whose prediction is another.

    Args:
        image: its number among those compared.
        label: its class.
        float_prediction, quantized_prediction: classes.
        float_margin: how far the float network's logit of its prediction is above that of the other one.
        quantized_margin: the same of the quantized network, its own prediction above the float network's.
    """

    image: int
    label: int
    float_prediction: int
    quantized_prediction: int
    float_margin: float
    quantized_margin: float


def flips(expected: Tensor, found: Tensor, labels: Tensor, first: int = 0) -> Iterator[Flip]:
    """The images that two networks predict differently.

    Args:
        expected, found: logits of the float network and of the quantized one, (N, C).
        labels: (N,), int64.
        first: the number of the first image.
    """
    a, b = expected.argmax(1), found.argmax(1)
    for place in torch.nonzero(a != b).flatten().tolist():
        own, other = int(a[place]), int(b[place])
        yield Flip(
            first + place,
            int(labels[place]),
            own,
            other,
            float(expected[place, own] - expected[place, other]),
            float(found[place, other] - found[place, own]),
        )
