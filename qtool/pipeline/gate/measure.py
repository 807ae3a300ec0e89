"""Measure runs for a gate; runs with equal inputs share calibration and the float network's outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qtool.config import Config
from qtool.data.loader import Batch, make_loader
from qtool.numerics.metrics import ratio_db, top_k_correct
from qtool.observers.stats import ModelStats
from qtool.pipeline import passes, runs, steps
from qtool.pipeline.corrections.run import correct, open_corrections
from qtool.pipeline.inputs import open_calibration, open_evaluation, open_subject, weights_sha256
from qtool.pipeline.ranges import find_ranges
from qtool.pipeline.ranks import ALONE
from qtool.quantizers.prepare import QuantizedModel
from qtool.report import Result

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was seen of a quantized network and its float one, image by image.

    Args:
        indices: (N,), numbers of the images in their dataset.
        float_correct, correct: (N,), whether the float, the quantized network finds the label.
        agree: (N,), whether both predict the same.
        signal, noise: sums of squares over the float logits, and over the differences from them.
    """

    indices: NDArray[np.int64]
    float_correct: Flags
    correct: Flags
    agree: Flags
    signal: float
    noise: float

    def __add__(self, other: Evidence) -> Evidence:
        mine, theirs = vars(self), vars(other)
        arrays = ("indices", "float_correct", "correct", "agree")
        joined: dict[str, Any] = {name: np.concatenate([mine[name], theirs[name]]) for name in arrays}
        return Evidence(**joined, signal=self.signal + other.signal, noise=self.noise + other.noise)

    @property
    def images(self) -> int:
        """How many images were seen."""
        return len(self.indices)

    def values(self) -> dict[str, float]:
        """The measured numbers: percent, percentage points, and dB."""
        top1, float_top1 = 100 * float(self.correct.mean()), 100 * float(self.float_correct.mean())
        finite = np.isfinite([self.signal, self.noise]).all()
        return {
            "top1": top1,
            "drop": float_top1 - top1,
            "agreement": 100 * float(self.agree.mean()),
            "logit_sqnr_db": ratio_db(self.signal, self.noise) if finite else -np.inf,
        }


def compare_batch(float_result: Result, quantized: Result) -> Evidence:
    """The evidence of one batch."""
    assert quantized.indices is not None
    logits, logits_q = float_result.logits, quantized.logits
    return Evidence(
        indices=quantized.indices.numpy(),
        float_correct=top_k_correct(logits, float_result.labels, 1).numpy(),
        correct=top_k_correct(logits_q, quantized.labels, 1).numpy(),
        agree=(float_result.predictions == quantized.predictions).numpy(),
        signal=float(logits.double().square().sum()),
        noise=float((logits.double() - logits_q.double()).square().sum()),
    )


def bench_key(config: Config) -> Hashable:
    """Equal for runs that may share a bench."""
    return config.model, config.data, config.run.seed, config.run.chosen_device, config.run.det


class Bench:
    """A float network and its evaluation images, for all runs on them.

    Args:
        config: of any of these runs.
        shuffled: whether images come in random order, as for a verdict before the last of them.

    Attributes:
        inputs: what a measured number depends on, apart from the settings under test.
        numbers: (N,), the evaluation images, ascending.
    """

    def __init__(self, config: Config, shuffled: bool) -> None:
        runs.check_before_work(config, data_needed=True)
        self._subject = open_subject(config)
        runs.refuse_quantized(self._subject, "check")
        self._evaluation = open_evaluation(config, self._subject)
        self._traced = self._subject.traced()
        self._float = steps.evaluable(self._subject.network, config.run.chosen_device)
        self._float_results: list[Result] = []
        self._stats: dict[Hashable, ModelStats] = {}
        self.numbers = np.array(self._evaluation.indices)
        # Another generator than that of calibration_indices, whose choice would come first.
        order = np.random.default_rng(config.run.seed).permutation(len(self.numbers))
        self._order = (self.numbers[order] if shuffled else self.numbers).tolist()
        self.inputs = self._inputs(config)

    def _inputs(self, config: Config) -> dict[str, Any]:
        dataset = self._evaluation.dataset
        digest = hashlib.sha256()
        for number in self._evaluation.indices:
            line = f"{Path(dataset.path_of(number)).name}\0{dataset.labels[number]}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))  # a file's name may be any bytes
        return {
            "arch": self._subject.arch,
            "checkpoint_sha256": self._subject.checkpoint_sha256,
            "weights_sha256": weights_sha256(self._subject.network),
            "dataset": dataset.name,
            "images": len(self.numbers),
            "images_sha256": digest.hexdigest(),
            "seed": config.run.seed,
        }

    def measure(self, config: Config, decided: Callable[[Evidence], bool], name: str) -> Evidence:
        """Quantize as config says, and evaluate until all images are seen or decided says so.

        Args:
            config: with the bench_key of this bench.
            decided: is given the evidence so far, after each batch.
            name: of the run, for the progress bar.
        """
        device = config.run.chosen_device
        model = self._quantized(config)
        runs.log_notes(model)
        model = steps.evaluable(model, device)
        data = config.data
        loader = make_loader(
            self._evaluation.dataset, batch_size=data.batch_size, workers=data.workers, indices=self._order
        )
        evidence: Evidence | None = None
        with closing(iter(loader)) as batches:  # type: ignore[type-var]  # a generator, which can be closed
            shown = tqdm(batches, desc=name, total=len(loader), unit="batch", leave=False, disable=None)
            for number, batch in enumerate(shown):
                quantized = steps.evaluate(model, [batch], device=device)
                seen = compare_batch(self._float_result(number, batch, device), quantized)
                evidence = seen if evidence is None else evidence + seen
                if decided(evidence):
                    break
        passes.note_bad_images(loader.bad_images)
        assert evidence is not None  # a loader without any good image has raised an error
        return evidence

    def _float_result(self, number: int, batch: Batch, device: str) -> Result:
        if number == len(self._float_results):
            self._float_results.append(steps.evaluate(self._float, [batch], device=device))
        return self._float_results[number]

    def _quantized(self, config: Config) -> QuantizedModel:
        corrections = open_corrections(config, self._traced, ALONE)
        if corrections is None:
            return steps.quantize(self._traced, self._stats_for(config), config.quantizers)
        ranges = find_ranges(config, self._subject, self._traced, self._evaluation, searches=True)
        images = ranges.calibration or open_calibration(config, self._subject, self._evaluation)
        corrected, _ = correct(config, self._traced, corrections, images, ranges.given, None)
        return corrected.model

    def _stats_for(self, config: Config) -> ModelStats | None:
        ranges = find_ranges(config, self._subject, self._traced, self._evaluation)
        if ranges.calibration is None:
            return ranges.given
        key = config.calibration
        if key not in self._stats:
            self._stats[key], _ = passes.measure_stats(config, self._traced, ranges.calibration)
        return self._stats[key]
