"""The harm of each point by running it: from its first layer on, what is in front of that runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtool.graph.replay import run_from
from qtool.graph.trace import layers
from qtool.graph.walk import Walk
from qtool.numerics.logits import logits_of
from qtool.numerics.spec import QParams
from qtool.quantizers.plan import ModelPlan
from qtool.quantizers.prepare import build
from qtool.search.groups import Group
from qtool.search.sensitivity.points import Plans, Point
from qtool.search.sensitivity.rounded import rounded_layers
from qtool.search.sensitivity.scores import LogitSums, Score

Batches = Sequence[tuple[Tensor, Tensor]]
# Images whose activations are in memory together.
TOGETHER = 64
Told = Callable[[], object]


def float_logits(plans: Plans, batches: Batches) -> list[Tensor]:
    """The logits of the float network, for each batch."""
    network = plans.float_network()
    with torch.no_grad():
        return [logits_of(network(images)) for images, _ in batches]


def harm_alone(
    plans: Plans, points: Sequence[Point], batches: Batches, told: Told = lambda: None
) -> list[Score]:
    """What is measured when only the group of each point is quantized.

    Args:
        plans: the network.
        points: of plans, or of others of the same network.
        batches: images and labels.
        told: is called for each point, once for every TOGETHER images.
    """
    network = plans.float_network()
    place = {node: number for number, node in enumerate(network.graph.nodes)}
    rounded = [rounded_layers(network, plans.folded.traced, point) for point in points]
    first = [min((layer.node for layer in group), key=place.__getitem__) for group in rounded]
    order = sorted(range(len(points)), key=lambda number: place[first[number]])
    sums = [LogitSums() for _ in points]
    for part in _parts(batches):
        expected = float_logits(plans, part)
        walk = Walk(network, [images for images, _ in part], _inputs(network))
        for number in order:
            walk.before(first[number])
            instead = {node: given for layer in rounded[number] for node, given in layer.instead().items()}
            for known, (_, labels), target in zip(walk.alive(), part, expected, strict=True):
                with torch.no_grad():
                    output, _ = run_from(network, known, instead=instead)
                sums[number].add(target, logits_of(output), labels)
            told()
    return [one.score() for one in sums]


def harm_without(
    plans: Plans, groups: Sequence[Group], batches: Batches, told: Told = lambda: None
) -> tuple[Score, list[Score]]:
    """What is measured when all is quantized, and when one group at a time is left in float.

    Args:
        plans: the network.
        groups: of plans.
        batches: images and labels.
        told: as for harm_alone.

    Returns:
        The score of the whole network quantized, and one for each group.
    """
    base = build(plans.folded, plans.whole).network
    places = {node.meta["layer"]: node for node in base.graph.nodes if "layer" in node.meta}
    points = [plans.without(group) for group in groups]
    names = [name for name, _, _ in layers(plans.folded.traced)]
    first = [_first_place(plans.whole, point.plan, names) for point in points]
    order = sorted(range(len(points)), key=first.__getitem__)
    whole, sums = LogitSums(), [LogitSums() for _ in points]
    for part in _parts(batches):
        expected = float_logits(plans, part)
        walk = Walk(base, [images for images, _ in part], _inputs(base))
        for number in order:
            start = next((places[name] for name in names[first[number] :] if name in places), None)
            if start is not None:
                walk.before(start)
            network = build(plans.folded, points[number].plan).network
            shared = _shared_nodes(plans.folded.traced, network, names[: first[number]])
            for values, (_, labels), target in zip(walk.alive(), part, expected, strict=True):
                known = {shared[_known_by(n)]: v for n, v in values.items() if _known_by(n) in shared}
                with torch.no_grad():
                    output, _ = run_from(network, known)
                sums[number].add(target, logits_of(output), labels)
            told()
        for (images, labels), target in zip(part, expected, strict=True):
            with torch.no_grad():
                whole.add(target, logits_of(base(images)), labels)
    return whole.score(), [one.score() for one in sums]


def _parts(batches: Batches) -> Iterator[Batches]:
    """The batches, as many at a time as there is memory for their activations."""
    part: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        if part and sum(len(labels) for _, labels in part) + len(batch[1]) > TOGETHER:
            yield part
            part = []
        part.append(batch)
    if part:
        yield part


def _inputs(network: fx.GraphModule) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node.op in ("placeholder", "get_attr")]


def _first_place(before: ModelPlan, after: ModelPlan, names: Sequence[str]) -> int:
    """The number of the first layer that another plan changes."""
    changed = (n for n, name in enumerate(names) if not same(before.layers[name], after.layers[name]))
    return next(changed, len(names))


def _shared_nodes(
    traced: fx.GraphModule, network: fx.GraphModule, unchanged: Sequence[str]
) -> dict[tuple[str, str], fx.Node]:
    """The nodes of a quantized network that have the values of another, which differs further on.

    Both are made from traced; what was put between its nodes is left out.

    Returns:
        The nodes by name and target, which are the same in the other.
    """
    here = {_known_by(node): node for node in network.graph.nodes}
    kept = set(unchanged)
    found = {}
    for node in traced.graph.nodes:
        if node.meta.get("layer", "") not in kept | {""}:
            break
        if _known_by(node) in here:
            found[_known_by(node)] = here[_known_by(node)]
    return found


def _known_by(node: fx.Node) -> tuple[str, str]:
    return node.name, str(node.target)


def same(a: Any, b: Any) -> bool:
    """Whether two plans of a layer, or parts of them, say the same."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, QParams):
        return a.same_grid(b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
