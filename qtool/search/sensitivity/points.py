"""What is measured: networks in which one group alone is quantized, or alone is left in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from qtool.graph.fast import channels_last
from qtool.graph.fold import Folded, fold_batch_norms, move_stats
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.plan import CAST, IDENTITY, ModelPlan, plan_model, quantized_weights
from qtool.quantizers.prepare import build
from qtool.search.groups import Group, quantizer_groups

Specs = Mapping[str, LayerSpec]
GroupBy = Callable[[fx.GraphModule, ModelPlan], tuple[Group, ...]]


@dataclass(frozen=True)
class Point:
    """One group, and the network in which only it is treated in a way of its own.

    Args:
        group: the layers.
        plan: what becomes of each layer then.
    """

    group: Group
    plan: ModelPlan


class Plans:
    """Plans a network with single groups quantized, or in float; weights are quantized once for all.

    Args:
        traced: the float network.
        stats: of the same network.
        specs: what is asked of its layers.
        group_by: finds the groups.

    Attributes:
        folded: the network, batch norms folded, in the order in memory in which it runs fastest.
        whole: its plan with every group quantized.
        groups: in the order of execution.
        base: its plan with every group in float. What was asked apart from integers, such as leaving a
            layer out, holds in all plans.
    """

    def __init__(
        self, traced: fx.GraphModule, stats: ModelStats, specs: Specs, group_by: GroupBy = quantizer_groups
    ) -> None:
        folded = fold_batch_norms(traced)
        self.folded = Folded(channels_last(folded.traced), folded.pairs)
        self.stats = move_stats(stats, folded.pairs)
        self.specs = dict(specs)
        self._weights = quantized_weights(self.folded.traced, specs)
        self.whole = self._plan(self.specs)
        self.groups = group_by(self.folded.traced, self.whole)
        grouped = {name for group in self.groups for name in group.layers}
        self._always = {name: spec for name, spec in self.specs.items() if name not in grouped}
        self.base = self._plan(self._always)

    def alone(self, group: Group) -> Point:
        """Only this group is quantized."""
        asked = {name: self.specs[name] for name in group.layers if name in self.specs}
        return Point(group, self._plan(self._always | asked))

    def without(self, group: Group) -> Point:
        """Only this group is left in float."""
        kept = {name: spec for name, spec in self.specs.items() if name not in group.layers}
        return Point(group, self._plan(kept))

    def float_network(self) -> fx.GraphModule:
        """The network of base."""
        changed = any(plan.kind in (IDENTITY, CAST) for plan in self.base.layers.values())
        return build(self.folded, self.base).network if changed else self.folded.traced

    def _plan(self, specs: Specs) -> ModelPlan:
        return plan_model(self.folded.traced, self.stats, specs, self._weights)


def points_alone(plans: Sequence[Plans]) -> list[list[Point]]:
    """For each of several ways to quantize, every group alone."""
    return [[one.alone(group) for group in one.groups] for one in plans]
