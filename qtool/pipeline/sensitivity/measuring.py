"""The harm that single groups of layers do, estimated or measured, in one process or several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor, fx

from qtool.config import QuantizeConfig, with_bits
from qtool.config.sections.sensitivity import BOTH, DAMAGE, GAIN, LAYER, SensitivityConfig
from qtool.graph.control import has_decisions
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.search.groups import Group, layer_groups, quantizer_groups
from qtool.search.sensitivity.estimate import estimate
from qtool.search.sensitivity.exact import Told, harm_alone, harm_without
from qtool.search.sensitivity.points import Plans
from qtool.search.sensitivity.scores import KL, SQNR, Score

LOG = logging.getLogger("qtool")

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """What was found of one group at some bits.

    Args:
        group: the layers.
        bits: of weights and activations; None for those of the layers' own settings.
        direction: "damage" of quantizing it alone, or "gain" of leaving it alone in float.
        score: of the network in which only this group is treated so.
        whole: of the network with all groups quantized; None for damage.
        estimated: whether the score is an estimate.
    """

    group: Group
    bits: int | None
    direction: str
    score: Score
    whole: Score | None = None
    estimated: bool = False

    def rank(self, metric: str) -> tuple[float, ...]:
        """For sorting: what hurts most first, that is the most damage or the least harm without it."""
        sign = -1.0 if self.direction == DAMAGE else 1.0
        return tuple(sign * part for part in self.score.key(metric))

    def worth(self, metric: str) -> float:
        """The harm that the group does, or that goes away without it."""
        harm = self.score.harm(metric)
        return harm if self.whole is None else self.whole.harm(metric) - harm


@dataclass(frozen=True)
class Share:
    """Some of the groups, to be measured one after the other.

    Args:
        bits: see Row.
        direction: see Row.
        first, last: number of the first group, in the order of execution, and of the one behind the last.
    """

    bits: int | None
    direction: str
    first: int
    last: int


@dataclass(frozen=True)
class Measured:
    """The scores of a share's groups, and of the network with all groups quantized; None for damage."""

    scores: tuple[Score, ...]
    whole: Score | None = None


class Measurer:
    """Measures shares; a function of one.

    Args:
        traced, stats: the float network.
        quantizers: the settings of the quantizer.
        batches: images and labels.
        asked: what to measure.
        told: is called for each group, once for every few images.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        stats: ModelStats,
        quantizers: QuantizeConfig,
        batches: Batches,
        asked: SensitivityConfig,
        told: Told = lambda: None,
    ) -> None:
        self.asked, self.batches = asked, batches
        self._traced, self._stats, self._quantizers, self._told = traced, stats, quantizers, told
        self._latest: tuple[int | None, Plans] | None = None

    def plans(self, bits: int | None) -> Plans:
        """The plans at some bits; those of the latest are kept."""
        if self._latest is None or self._latest[0] != bits:
            settings = self._quantizers if bits is None else with_bits(self._quantizers, bits, bits)
            by = layer_groups if self.asked.per == LAYER else quantizer_groups
            specs = steps.specs_for(self._traced, settings)
            self._latest = (bits, Plans(self._traced, self._stats, specs, by))
        return self._latest[1]

    def __call__(self, share: Share) -> Measured:
        """The scores of a share."""
        plans = self.plans(share.bits)
        groups = plans.groups[share.first : share.last]
        if share.direction == DAMAGE:
            points = [plans.alone(group) for group in groups]
            return Measured(tuple(harm_alone(plans, points, self.batches, self._told)))
        whole, scores = harm_without(plans, groups, self.batches, self._told)
        return Measured(tuple(scores), whole)


# What gives the results of shares, in their order.
RunShares = Callable[[Sequence[Share]], Iterable[Measured]]


def measure(measurer: Measurer, seed: int, run: RunShares, parts: int = 1) -> list[Row]:
    """All rows, by bits and direction, each sorted by what hurts most.

    Args:
        measurer: of this process.
        seed: of the estimates' random vectors.
        run: has shares measured.
        parts: into how many shares groups are divided.
    """
    asked = measurer.asked
    rows: list[Row] = []
    for bits in asked.widths or (None,):
        groups = measurer.plans(bits).groups
        if not groups:
            continue
        for direction in (DAMAGE, GAIN) if asked.direction == BOTH else (asked.direction,):
            if direction == DAMAGE and is_estimated(asked) and not _branches(measurer, bits):
                found = _estimated(measurer, bits, seed)
            else:
                found = list(_measured(bits, direction, groups, run, parts))
            rows += sorted(found, key=lambda row: row.rank(asked.by))
    return rows


def is_estimated(asked: SensitivityConfig) -> bool:
    """Whether the damage is estimated, where the network allows it."""
    return asked.by in (SQNR, KL) and not asked.exact


def _branches(measurer: Measurer, bits: int | None) -> bool:
    if not has_decisions(measurer.plans(bits).folded.traced.graph):
        return False
    LOG.info("the network takes branches by values: the damage is measured, not estimated")
    return True


def _estimated(measurer: Measurer, bits: int | None, seed: int) -> list[Row]:
    plans = measurer.plans(bits)
    points = [plans.alone(group) for group in plans.groups]
    images = [images for images, _ in measurer.batches]
    scores = estimate(plans, points, images, measurer.asked.by, seed)
    return [
        Row(group, bits, DAMAGE, score, estimated=True)
        for group, score in zip(plans.groups, scores, strict=True)
    ]


def _measured(
    bits: int | None, direction: str, groups: Sequence[Group], run: RunShares, parts: int
) -> Iterator[Row]:
    # Groups next to each other: what lies in front of a share's first layer is computed once for it.
    ends = np.linspace(0, len(groups), min(parts, len(groups)) + 1).astype(int).tolist()
    shares = [Share(bits, direction, first, last) for first, last in pairwise(ends)]
    for share, found in zip(shares, run(shares), strict=True):
        of_share = groups[share.first : share.last]
        for group, score in zip(of_share, found.scores, strict=True):
            yield Row(group, bits, direction, score, found.whole)
