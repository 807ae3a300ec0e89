"""Quantize with corrections: the float network first, then the plan, each method in its order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, fx

from qtool.algorithms.exactness import check_unchanged
from qtool.algorithms.progress import ShowProgress
from qtool.algorithms.records import CorrectionReport
from qtool.algorithms.store import LayerStore
from qtool.config import CorrectionsConfig, QuantizeConfig
from qtool.errors import ConfigError
from qtool.graph.fold import Folded, fold_batch_norms, move_stats
from qtool.graph.trace import layers
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.corrections.methods import NETWORK, OUTPUTS, PLAN, Correction, correction
from qtool.pipeline.corrections.presets import choose, traits_of
from qtool.quantizers.lockstep import HAS_INTEGERS
from qtool.quantizers.plan import FAKE, INTEGER, ModelPlan, plan_model
from qtool.quantizers.prepare import QuantizedModel, build

LOG = logging.getLogger("qtool")

Measure = Callable[[fx.GraphModule], ModelStats]
Show = Callable[[str], AbstractContextManager[ShowProgress]]
StoreFor = Callable[[str, dict[str, Any], Sequence[fx.GraphModule], ModelPlan], LayerStore | None]
# Images on which the float network is compared before and behind a change of it.
CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Corrections:
    """What a run corrects, decided before any long work.

    Args:
        quantizers: the settings of the quantizer, with what a preset chose.
        methods: in order; those of the network come first.
        preset: the preset's name, or None.
        words: what the preset chose, a line each.
    """

    quantizers: QuantizeConfig
    methods: tuple[Correction, ...]
    preset: str | None = None
    words: tuple[str, ...] = ()

    @property
    def on_network(self) -> list[Correction]:
        """Those that change the float network and leave its function."""
        return [c for c in self.methods if c.method.stage == NETWORK]

    @property
    def on_plan(self) -> list[Correction]:
        """Those that change integers and grids."""
        return [c for c in self.methods if c.method.stage == PLAN]


@dataclass(frozen=True)
class Corrected:
    """A network that was quantized with corrections.

    Args:
        model: the quantized network.
        stats: of the float network as it was quantized.
        specs: what was asked of each layer.
        folded: the float network that the plan of model is of.
        record: what results.json says: methods, settings, layers, seconds.
    """

    model: QuantizedModel
    stats: ModelStats
    specs: dict[str, LayerSpec]
    folded: Folded
    record: dict[str, Any] = field(default_factory=dict)


def decide(traced: fx.GraphModule, quantizers: QuantizeConfig, asked: CorrectionsConfig) -> Corrections:
    """What is to be corrected.

    Args:
        traced: the float network.
        quantizers: the settings of the quantizer.
        asked: preset and methods; what is named comes in place of the preset's own.

    Raises:
        ConfigError: if a setting is wrong, or methods stand in an order that cannot be.
    """
    named = tuple(asked.list())
    words: tuple[str, ...] = ()
    if asked.preset not in (None, "none"):
        assert asked.preset is not None
        traits = traits_of(traced, steps.specs_for(traced, quantizers))
        choice = choose(asked.preset, quantizers, traits)
        quantizers, words = choice.quantizers, choice.words
        named = named or choice.methods
    methods = tuple(correction(one) for one in named)
    _check_order(methods)
    return Corrections(quantizers, methods, asked.preset, words)


def _check_order(methods: Sequence[Correction]) -> None:
    last_on_plan = None
    for one in methods:
        if one.method.stage == PLAN:
            last_on_plan = one.name
        elif last_on_plan is not None:
            raise ConfigError(
                f"corrections: {one.name} changes the float network, and stands behind {last_on_plan}, which "
                "works on integers; put it in front"
            )


def quantize_corrected(
    traced: fx.GraphModule,
    corrections: Corrections,
    images: Sequence[Tensor],
    measure: Measure,
    *,
    given: ModelStats | None = None,
    show: Show | None = None,
    store_for: StoreFor | None = None,
) -> Corrected:
    """Quantize a network with corrections; the given one stays as it was.

    Args:
        traced: the float network.
        corrections: from decide.
        images: calibration images that corrections look at, in batches.
        measure: gives the statistics of a network, from all calibration images.
        given: statistics of traced, where there are some.
        show: gives what is told of a method's progress while it runs, for its name.
        store_for: gives where a method keeps what it has found for each layer, for its name, its settings,
            the float networks and the plan that it starts from.

    Raises:
        ConfigError: if a setting cannot be honoured.
        ModelError: if a method that is to leave the float network's function has changed it.
    """
    specs = steps.specs_for(traced, corrections.quantizers)
    before = fold_batch_norms(traced)
    quantized = [n for n, s in specs.items() if s.weight is not None or s.output is not None]
    folded, measured, records = _correct_network(
        traced, before, corrections, quantized, images, measure, given
    )
    plan = plan_model(folded.traced, move_stats(measured, folded.pairs), specs)
    reference = folded.traced
    for one in corrections.on_plan:
        start = time.perf_counter()
        kinds = (INTEGER, FAKE) if one.method.on == OUTPUTS else HAS_INTEGERS
        names = [name for name, layer in plan.layers.items() if layer.kind in kinds]
        extra: dict[str, Any] = {}
        if "store" in one.method.needs:
            settings = {**asdict(one.settings), "exclude": one.exclude}
            networks = (reference, folded.traced)
            extra["store"] = None if store_for is None else store_for(one.name, settings, networks, plan)
        if "traced" in one.method.needs:
            extra["traced"] = traced
        batches = (images,) if "batches" in one.method.needs else ()
        told = show(one.name) if show is not None and "progress" in one.method.needs else nullcontext()
        with told as progress:
            if progress is not None:
                extra["progress"] = progress
            folded, plan, report = one.method.run(
                reference, folded, plan, *batches, layers=one.chosen(names), settings=one.settings, **extra
            )
        records.append(_told(one, report, time.perf_counter() - start))
    record: dict[str, Any] = {"preset": corrections.preset, "images": sum(len(b) for b in images)}
    record["methods"] = records
    return Corrected(build(folded, plan), measured, specs, folded, record)


def _correct_network(
    traced: fx.GraphModule,
    before: Folded,
    corrections: Corrections,
    quantized: Collection[str],
    images: Sequence[Tensor],
    measure: Measure,
    given: ModelStats | None,
) -> tuple[Folded, ModelStats, list[dict[str, Any]]]:
    """The float network as it is to be quantized, its statistics, and what was done to it."""
    folded, stats, records = before, given, []
    for one in corrections.on_network:
        start = time.perf_counter()
        if stats is None and _reads_stats(one):
            stats = measure(traced if folded is before else folded.traced)
        names = [name for name, _, _ in layers(folded.traced)]
        extra = {"batches": images} if "batches" in one.method.needs else {}
        known = move_stats(stats or ModelStats({}), before.pairs)
        allowed = [name for name in one.chosen(names) if name in quantized]
        new, report = one.method.run(folded, known, layers=allowed, settings=one.settings, **extra)
        if report.changed:
            check_unchanged(before.traced, new.traced, images[0][:CHECKED_IMAGES])
            folded, stats = new, None
        records.append(_told(one, report, time.perf_counter() - start))
    if stats is None:
        stats = measure(traced if folded is before else folded.traced)
    return folded, stats, records


def _reads_stats(one: Correction) -> bool:
    """Whether a method needs statistics; equalization by weights does not, unless it absorbs biases."""
    if one.name == "equalization":
        return bool(one.settings.by != "weights" or one.settings.absorb)
    return "stats" in one.method.needs and "batches" not in one.method.needs


def _told(one: Correction, report: CorrectionReport, seconds: float) -> dict[str, Any]:
    """What results.json says of a correction, which is also said in the log."""
    changes = [change.change for change in report.changed]
    size = f", by {100 * max(changes):.2g} % at most" if changes else ""
    LOG.info("%s: %d layers%s, %.1f s", one.name, len(changes), size, seconds)
    for name, why in list(report.left.items())[:3]:
        LOG.info("%s: %s is left alone: %s", one.name, name, why)
    if len(report.left) > 3:
        LOG.info("%s: %d more layers are left alone; results.json says why", one.name, len(report.left) - 3)
    return {
        "method": one.name,
        "settings": asdict(one.settings),
        "exclude": list(one.exclude),
        "seconds": round(seconds, 3),
        "changed": [{"layer": c.name, "change": c.change, "note": c.note} for c in report.changed],
        "left": dict(report.left),
    }
