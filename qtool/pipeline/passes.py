"""Passes of a run's images through a network, by one process or several: calibration and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor, fx, nn
from tqdm import tqdm

from qtool.config import Config
from qtool.data.loader import Batch, Loader
from qtool.errors import ModelError, StatsError
from qtool.graph.control import has_decisions
from qtool.graph.observe import NonFiniteError
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.calibration import chunk_size, measure
from qtool.pipeline.inputs import Images
from qtool.pipeline.provenance import fingerprint_of
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.report import Result

LOG = logging.getLogger("qtool")


def measure_stats(
    config: Config, traced: fx.GraphModule, images: Images, ranks: Ranks = ALONE
) -> tuple[ModelStats, int]:
    """Calibrate on some images, as a run's data and device settings say; also how many were unreadable.

    Raises:
        StatsError: if a layer gives NaN or infinity, naming the first image for which it does.
    """
    LOG.info("calibrating on %s", images.words)
    (value, *_) = (n.meta["value"] for n in traced.graph.nodes if n.op == "placeholder")
    # What a network decides, it decides for a batch.
    decides = has_decisions(traced.graph)
    if decides and ranks.size > 1:
        raise ModelError(
            "the network decides on the values of a batch, and not every process sees each of its branches; "
            "start it without torchrun"
        )
    size = config.data.batch_size if decides else chunk_size(tuple(value.shape[1:]))
    loader = images.loader(config, size, ranks)
    seen: dict[int, Tensor] = {}

    def stream() -> Iterator[tuple[int, Tensor]]:
        for batch in _shown(config, loader, "calibrating", ranks):
            seen[batch.number] = batch.indices
            yield batch.number, batch.images

    device = config.run.chosen_device
    asked = config.calibration.batchwise_statistics
    group = config.data.batch_size if asked == "off" else 1
    with ranks.alone():
        try:
            stats = measure(
                steps.evaluable(traced, device), stream(), size,
                device=device, batchwise=asked, group=group, ranks=ranks,
            )  # fmt: skip
        except NonFiniteError as error:
            number, position = divmod(error.image, size)
            path = images.dataset.path_of(int(seen[number][position]))
            raise StatsError(
                f"calibration: {error.where} holds {error.cause}, first for {path}; "
                "check the weights and the image"
            ) from error
    bad = [path for share in ranks.gather(loader.bad_images) for path in share]
    note_bad_images(bad)
    return replace(stats, fingerprint=fingerprint_of(traced, images.preprocessing)), len(bad)


def evaluate_images(
    config: Config, network: nn.Module, images: Images, doing: str, ranks: Ranks = ALONE
) -> Result:
    """Evaluate a network on some images, as a run's data and device settings say."""
    loader = images.loader(config, ranks=ranks)
    batches = _shown(config, loader, doing, ranks)
    with ranks.alone():
        result = steps.evaluate(network, batches, device=config.run.chosen_device, ranks=ranks)
    note_bad_images([path for share in ranks.gather(loader.bad_images) for path in share])
    return result


def _shown(config: Config, loader: Loader, doing: str, ranks: Ranks) -> Iterable[Batch]:
    """The batches, with a bar on stderr, or a line in the log every so many."""
    every = config.data.print_freq
    if every is None:
        return tqdm(loader, desc=doing, unit="batch", leave=False, disable=None if ranks.first else True)
    return _Announced(loader, every, doing)


class _Announced:
    """Batches that log a line every so many, at every iteration."""

    def __init__(self, loader: Loader, every: int, doing: str) -> None:
        self.loader, self.every, self.doing = loader, every, doing

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader, start=1):
            yield batch
            if number % self.every == 0 or number == len(self.loader):
                LOG.info("%s: batch %d of %d", self.doing, number, len(self.loader))


def note_bad_images(paths: list[str]) -> None:
    """Warn of the images that were left out, if any."""
    if paths:
        LOG.warning("skipped %d unreadable images, such as %s", len(paths), paths[0])
