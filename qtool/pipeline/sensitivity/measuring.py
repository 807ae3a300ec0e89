"""The harm that single groups of layers do, estimated or measured, with a bar of progress."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx
from tqdm import tqdm

from qtool.config import QuantizeConfig, with_bits
from qtool.config.sections.sensitivity import DAMAGE, GAIN, LAYER, SensitivityConfig
from qtool.graph.control import has_decisions
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.search.groups import Group, layer_groups, quantizer_groups
from qtool.search.sensitivity.estimate import estimate
from qtool.search.sensitivity.exact import harm_alone, harm_without
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


def measure(
    traced: fx.GraphModule,
    stats: ModelStats,
    quantizers: QuantizeConfig,
    batches: Batches,
    asked: SensitivityConfig,
    seed: int,
) -> list[Row]:
    """All rows, by bits and direction, each sorted by what hurts most.

    Args:
        traced, stats: the float network.
        quantizers: the settings of the quantizer.
        batches: images and labels.
        asked: what to measure.
        seed: of the estimates' random vectors.
    """
    rows: list[Row] = []
    for bits in asked.widths or (None,):
        settings = quantizers if bits is None else with_bits(quantizers, bits, bits)
        by = layer_groups if asked.per == LAYER else quantizer_groups
        plans = Plans(traced, stats, steps.specs_for(traced, settings), by)
        if not plans.groups:
            continue
        if asked.direction != GAIN:
            rows += _damage(plans, bits, batches, asked, seed)
        if asked.direction != DAMAGE:
            rows += _gain(plans, bits, batches, asked)
    return rows


def _damage(
    plans: Plans, bits: int | None, batches: Batches, asked: SensitivityConfig, seed: int
) -> list[Row]:
    points = [plans.alone(group) for group in plans.groups]
    estimated = asked.by in (SQNR, KL) and not asked.exact
    if estimated and has_decisions(plans.folded.traced.graph):
        LOG.info("the network takes branches by values: the damage is measured, not estimated")
        estimated = False
    if estimated:
        scores = estimate(plans, points, [images for images, _ in batches], asked.by, seed)
    else:
        with tqdm(desc="measuring damage", unit="run", leave=False, disable=None) as bar:
            scores = harm_alone(plans, points, batches, bar.update)
    rows = [
        Row(group, bits, DAMAGE, score, estimated=estimated)
        for group, score in zip(plans.groups, scores, strict=True)
    ]
    return sorted(rows, key=lambda row: row.rank(asked.by))


def _gain(plans: Plans, bits: int | None, batches: Batches, asked: SensitivityConfig) -> list[Row]:
    with tqdm(desc="measuring gain", unit="run", leave=False, disable=None) as bar:
        whole, scores = harm_without(plans, plans.groups, batches, bar.update)
    rows = [Row(group, bits, GAIN, score, whole) for group, score in zip(plans.groups, scores, strict=True)]
    return sorted(rows, key=lambda row: row.rank(asked.by))
