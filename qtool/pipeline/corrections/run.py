"""The corrections of a command's run: its images, its progress bars, its files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, fx
from tqdm import tqdm

from qtool.algorithms.progress import Progress, ShowProgress
from qtool.algorithms.store import LayerStore
from qtool.config import Config
from qtool.data.calibration_set import calibration_indices
from qtool.errors import ConfigError
from qtool.observers.stats import ModelStats
from qtool.pipeline.corrections import Corrected, Corrections, decide, quantize_corrected
from qtool.pipeline.inputs import Images
from qtool.pipeline.layer_files import LayerFiles, fingerprint_of
from qtool.pipeline.passes import measure_stats
from qtool.pipeline.ranks import Ranks
from qtool.quantizers.plan import ModelPlan

LOG = logging.getLogger("qtool")

LAYERS_FOLDER = "corrected_layers"
# Images that go through the networks together.
BATCH = 32


def open_corrections(config: Config, traced: fx.GraphModule, ranks: Ranks) -> Corrections | None:
    """What a run corrects, decided and said; None for nothing.

    Raises:
        ConfigError: if a setting is wrong, or does not go with another.
    """
    asked = config.corrections
    if not asked.asked:
        if asked.images != type(asked).images:
            raise ConfigError(
                "--corrections-images: has an effect with --corrections or --preset only; add one"
            )
        return None
    flag = "--corrections" if asked.methods else f"--preset {asked.preset}"
    against = {
        "--qe-dynamic": (config.quantizers.dynamic, "corrections need ranges that are known beforehand"),
        "--qe-lapq": (config.lapq.enabled, "LAPQ chooses ranges for the network as it is"),
        "--qe-reduce-range": (config.conversion.reduce_range, "it quantizes anew, without corrections"),
        "torchrun": (ranks.size > 1, "corrections run in one process"),
    }
    for other, (given, reason) in against.items():
        if given:
            raise ConfigError(f"{flag}: does not go with {other}: {reason}; leave one of the two out")
    corrections = decide(traced, config.quantizers, asked)
    _check_resumed(config, corrections)
    if corrections.preset is not None:
        for line in corrections.words:
            LOG.info("preset %s: %s", corrections.preset, line)
        if asked.methods:
            LOG.info("preset %s: its estimators only, as corrections are named", corrections.preset)
    return corrections


def _check_resumed(config: Config, corrections: Corrections) -> None:
    folder = config.search.resume
    if folder is None:
        return
    if not any("store" in one.method.needs for one in corrections.methods):
        raise ConfigError(
            "--resume-search-from: none of these corrections takes long enough to be resumed; leave it out"
        )
    if not (folder / LAYERS_FOLDER).is_dir():
        raise ConfigError(
            f"--resume-search-from: {folder} has no folder {LAYERS_FOLDER}; name the folder of a run with "
            "gptq, adaround or reconstruction"
        )


def correct(
    config: Config, traced: fx.GraphModule, corrections: Corrections, images: Images,
    given: ModelStats | None, folder: Path | None,
) -> tuple[Corrected, dict[str, Any]]:  # fmt: skip
    """Quantize with corrections; also what results.json says of the calibration.

    Args:
        config, traced: of the run.
        corrections: from open_corrections.
        images: for calibration.
        given: statistics from a file, None to measure them.
        folder: of the run, for what long methods find layer by layer; None keeps nothing.
    """
    batches = load_images(config, images)
    calibration: dict[str, Any] = {}

    def measure(network: fx.GraphModule) -> ModelStats:
        stats, skipped = measure_stats(config, network, images)
        calibration.update(images=len(images.indices) - skipped, skipped=skipped)
        return stats

    def store_for(
        name: str, settings: dict[str, Any], networks: Sequence[fx.GraphModule], plan: ModelPlan
    ) -> LayerStore | None:
        if folder is None:
            return None
        inputs = fingerprint_of(settings, networks, plan, batches)
        earlier = config.search.resume
        own = LayerFiles(folder / LAYERS_FOLDER / name, inputs)
        if earlier is None:
            return own
        return Resumed(own, LayerFiles(earlier / LAYERS_FOLDER / name, inputs), name)

    corrected = quantize_corrected(
        traced, corrections, batches, measure, given=given, show=shown, store_for=store_for
    )
    return corrected, calibration


def load_images(config: Config, images: Images) -> list[Tensor]:
    """The images that corrections look at, in memory, in batches."""
    count = len(images.indices)
    wanted = min(config.corrections.images, count)
    numbers = calibration_indices(count, samples=wanted, seed=config.run.seed)
    loader = images.part(numbers).loader(config, BATCH)
    LOG.info("corrections look at %d of the calibration images", wanted)
    return [batch.images for batch in loader]


class Resumed:
    """What an earlier run has found, and where it is kept from now on."""

    def __init__(self, own: LayerStore, earlier: LayerStore, name: str) -> None:
        self.own, self.earlier, self.name = own, earlier, name
        self._said = False

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What either has; what only the earlier one has is copied."""
        found = self.own.get(key)
        if found is None:
            found = self.earlier.get(key)
            if found is not None:
                if not self._said:
                    LOG.info("%s: layers that the earlier run has finished are taken over", self.name)
                    self._said = True
                self.own.put(key, found)
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a key."""
        self.own.put(key, tensors)


@contextmanager
def shown(name: str) -> Iterator[ShowProgress]:
    """A bar on stderr for one method: layers done, and about how long the rest takes."""
    with tqdm(desc=name, unit="layer", leave=False, disable=None) as bar:

        def show(progress: Progress) -> None:
            left = "" if progress.seconds_left is None else f", about {progress.seconds_left:.0f} s left"
            bar.total = progress.of
            bar.set_postfix_str(f"{progress.name}{left}")
            bar.update(progress.number - 1 - bar.n)

        yield show
