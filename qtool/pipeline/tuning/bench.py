"""Measures candidates on one network: what they have in common is done once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qtool.config import Config, QuantizeConfig, check
from qtool.data.loader import Batch
from qtool.deploy.engine import AUTO, SIMULATE, Engine, choose_engine
from qtool.deploy.timing import time_in_turns
from qtool.errors import QtoolError
from qtool.graph.fold import fold_batch_norms
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.corrections import Corrections, decide, quantize_corrected
from qtool.pipeline.corrections.run import load_images
from qtool.pipeline.engine import open_engine
from qtool.pipeline.inputs import (
    Images,
    Subject,
    open_calibration,
    open_evaluation,
    open_subject,
    weights_sha256,
)
from qtool.pipeline.logits import logits_of
from qtool.pipeline.passes import measure_stats
from qtool.pipeline.tuning.files import unpack
from qtool.pipeline.tuning.numbers import numbers, relative_errors, rows_of
from qtool.pipeline.tuning.space import TuningSpace, config_of
from qtool.pipeline.workers import for_worker
from qtool.quantizers.prepare import QuantizedModel
from qtool.report import Result
from qtool.search.costs import costs
from qtool.search.outcomes import Outcome, rounded
from qtool.search.space import CONFIRM, PROBE, RANKING, TRIAL, Candidate, Proposal

# Evaluation images up to so many bytes stay in memory.
MAX_BYTES = 2 << 30
# Statistics of so many float networks, as corrections leave them, are kept.
KEPT_STATS = 8
LATENCY_S = 1.0


@dataclass(frozen=True)
class Parts:
    """What a bench works on.

    Args:
        config: where the tuning starts.
        subject: the float network.
        traced: the same, traced.
        evaluation: the evaluation images, all of them.
        stats: of the network.
        float_result: of it on the evaluation images.
        space: what a candidate means for the layers.
    """

    config: Config
    subject: Subject
    traced: fx.GraphModule
    evaluation: Images
    stats: ModelStats
    float_result: Result
    space: TuningSpace


@dataclass(frozen=True)
class Made:
    """A candidate's network.

    Args:
        model: the network.
        specs: what was asked of each layer.
        stats: that its grids come from.
        record: of its corrections, for results.json.
    """

    model: QuantizedModel
    specs: Mapping[str, LayerSpec]
    stats: ModelStats
    record: Mapping[str, Any]


class Bench:
    """Measures proposals; a function of one.

    Args:
        parts: what it works on.

    Attributes:
        choosing: the images that choose, those kept apart left out.
        held_out: those kept apart.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.folded = fold_batch_norms(parts.traced).traced
        self.choosing, self.held_out = split(parts.config, parts.evaluation)
        self.float_result = rows_of(parts.float_result, self.choosing.indices)
        self._stats = {weights_sha256(parts.traced): parts.stats}
        self._few: dict[tuple[int, ...], list[Tensor]] = {}
        self._known: list[tuple[Any, dict[str, Any]]] = []

    def __call__(self, proposal: Proposal) -> Outcome:
        """What there is to know of a proposal; one that cannot be made says why."""
        start = time.perf_counter()
        try:
            with torch.no_grad():
                values = self._measure(proposal)
        except QtoolError as error:
            reason = str(error).splitlines()[0]
            return Outcome(failure=reason, seconds=time.perf_counter() - start)
        return Outcome(values, time.perf_counter() - start)

    def _measure(self, proposal: Proposal) -> dict[str, Any]:
        if proposal.kind != TRIAL:
            return self._measure_anew(proposal)
        # Candidates that differ may be one network: a preset chooses ranges where nothing is asked.
        asked = self._asked_of_layers(proposal.candidate)
        found = next((values for known, values in self._known if known == asked), None)
        if found is None:
            found = self._measure_anew(proposal)
            self._known.append((asked, found))
        return found

    def _asked_of_layers(self, candidate: Candidate) -> tuple[Any, ...]:
        """All that a candidate's network depends on."""
        quantizers, corrections = self._decided(candidate)
        methods = () if corrections is None else corrections.methods
        return steps.specs_for(self.parts.traced, quantizers), quantizers.per_sample, methods

    def _measure_anew(self, proposal: Proposal) -> dict[str, Any]:
        made = self.make(proposal.candidate, plain=proposal.kind == RANKING)
        if proposal.kind in (PROBE, RANKING):
            return {"error": rounded(self._error(made.model, proposal.images))}
        engine = self._engine(made.model, asked=proposal.kind == CONFIRM)
        result = steps.evaluate(engine.network, self._batches(), device=self._device)
        found = asdict(costs(self.folded, made.model.plan))
        found |= numbers(self.float_result, result, self.parts.config.tuning.ranking_images)
        found["engine"] = engine.name
        if self.parts.config.tuning.objective == "latency":
            found["latency_ms"] = self._latency(engine.network)
        return found

    def make(self, candidate: Candidate, plain: bool = False) -> Made:
        """The network of a candidate, as `qtool quantize` makes it.

        Args:
            candidate: what is asked.
            plain: leave out corrections of integers.
        """
        traced = self.parts.traced
        quantizers, corrections = self._decided(candidate)
        if corrections is None:
            model = steps.quantize(traced, self.parts.stats, quantizers)
            return Made(model, steps.specs_for(traced, quantizers), self.parts.stats, {})
        if plain:
            corrections = replace(corrections, methods=tuple(corrections.on_network))
        done = quantize_corrected(
            traced, corrections, self._corrected_on, self._measure_stats, given=self.parts.stats
        )
        return Made(done.model, done.specs, done.stats, {"corrections": done.record})

    def _decided(self, candidate: Candidate) -> tuple[QuantizeConfig, Corrections | None]:
        """The settings of a candidate, a preset's among them, and its corrections, if there are any."""
        config = config_of(self.parts.config, candidate, self.parts.space)
        check(config.quantizers)
        if not config.corrections.asked:
            return replace(config.quantizers, stats_file=None), None
        corrections = decide(self.parts.traced, config.quantizers, config.corrections)
        return corrections.quantizers, corrections

    @property
    def _device(self) -> str:
        return self.parts.config.run.chosen_device

    def _engine(self, model: QuantizedModel, asked: bool) -> Engine:
        if asked:
            return open_engine(self.parts.config, model, self.choosing)
        engine = self.parts.config.tuning.trial_engine
        if engine == AUTO and self._device != "cpu":
            engine = SIMULATE
        return choose_engine(model, engine)

    def _error(self, model: QuantizedModel, images: Sequence[int]) -> float:
        """How far the logits are from the float network's on some images: the mean of each image's NMSE."""
        numbers_ = tuple(images) or tuple(self.choosing.indices)
        if numbers_ not in self._few:
            self._few = {
                numbers_: [
                    b.images for b in replace(self.choosing, indices=list(numbers_)).loader(self._quiet)
                ]
            }
        wanted = rows_of(self.float_result, numbers_).logits
        on_device = steps.evaluable(model, self._device)
        logits = [logits_of(on_device(x.to(self._device))).cpu().float() for x in self._few[numbers_]]
        return float(relative_errors(wanted, torch.cat(logits)).mean())

    def _latency(self, network: nn.Module) -> float:
        image = next(iter(self._batches())).images[:1]
        return rounded(time_in_turns({"it": network}, image, LATENCY_S)["it"].median_ms)

    def _batches(self) -> Iterable[Batch]:
        """The images that choose, from memory if there is room."""
        return self._kept or self.choosing.loader(self._quiet)

    @cached_property
    def _kept(self) -> list[Batch]:
        kept, size = [], 0
        for batch in self.choosing.loader(self._quiet):
            size += batch.images.nbytes
            if size > MAX_BYTES:
                return []
            kept.append(batch)
        return kept

    @cached_property
    def _quiet(self) -> Config:
        """The settings without progress bars, of which a trial would show many."""
        config = self.parts.config
        return replace(config, data=replace(config.data, print_freq=1 << 30))

    @cached_property
    def _calibration(self) -> Images:
        return open_calibration(self.parts.config, self.parts.subject, self.parts.evaluation)

    @cached_property
    def _corrected_on(self) -> list[Tensor]:
        return load_images(self._quiet, self._calibration)

    def _measure_stats(self, network: fx.GraphModule) -> ModelStats:
        """The statistics of a network that corrections have changed, once for the same weights."""
        key = weights_sha256(network)
        if key not in self._stats:
            if len(self._stats) >= KEPT_STATS:
                del self._stats[list(self._stats)[1]]  # the first is of the network itself
            self._stats[key], _ = measure_stats(self._quiet, network, self._calibration)
        return self._stats[key]


def split(config: Config, evaluation: Images) -> tuple[Images, Images]:
    """The images that choose, and those that are kept apart, by seed; without --holdout none are."""
    count = len(evaluation.indices)
    apart = round(config.tuning.holdout * count)
    # Another generator than that of calibration_indices, whose choice would come first.
    order = np.random.default_rng(config.run.seed).permutation(count)
    return evaluation.part(sorted(order[apart:].tolist())), evaluation.part(sorted(order[:apart].tolist()))


@dataclass(frozen=True)
class MakeBench:
    """Makes a bench in another process.

    Args:
        config: where the tuning starts.
        space: what a candidate means for the layers.
        files: from pack.
    """

    config: Config
    space: TuningSpace
    files: Mapping[str, bytes]

    def __call__(self) -> Bench:
        config = for_worker(self.config)
        subject = open_subject(config)
        evaluation = open_evaluation(config, subject)
        stats, float_result = unpack(self.files)
        return Bench(Parts(config, subject, subject.traced(), evaluation, stats, float_result, self.space))
