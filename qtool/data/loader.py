"""Images in batches, read by worker processes; the batches do not depend on how many."""

import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtool.data.image_dataset import ImageDataset, Sample
from qtool.errors import DataError


class Batch(NamedTuple):
    """Some images, in the order that was asked for."""

    images: Tensor
    """float32, shape (N, C, H, W)"""
    labels: Tensor
    """int64, shape (N,)"""
    indices: Tensor
    """int64, shape (N,): the numbers of the images in their dataset"""


@dataclass(frozen=True)
class _BadImage:
    """What a worker sends in place of an image; an exception would arrive wrapped in a traceback."""

    path: str
    reason: str


@dataclass
class _Collated:
    """What a worker sends for one batch."""

    images: Tensor | None = None
    labels: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    bad_images: list[_BadImage] = field(default_factory=list)
    other_size: tuple[int, int] | None = None
    """the numbers of two images that differ in size"""


class Loader:
    """Batches of the images of a dataset, the same ones in the same order at every iteration.

    Attributes:
        num_images: how many images were asked for.
        bad_images: after an iteration, the paths of the images that it left out.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], batch_size: int, workers: int) -> None:
        self.dataset = dataset
        self.num_images = len(indices)
        self.bad_images: list[str] = []
        self._batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self._workers = min(workers, len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Read the images, batch after batch; one whose images are all bad is passed over.

        Raises:
            DataError: if an image cannot be read (unless the dataset skips those), if none can, if
                the images of a batch differ in size, or if a worker process dies.
        """
        self.bad_images = []
        bad: list[_BadImage] = []
        for collated in self._collated():
            bad += collated.bad_images
            if bad and not self.dataset.skip_bad_images:
                raise DataError(f"{bad[0].reason}; replace the image or pass --skip-bad-images")
            if collated.other_size is not None:
                raise DataError(self._mismatch(*collated.other_size))
            self.bad_images = [image.path for image in bad]
            if collated.images is not None:
                # What a worker sends holds a file open for as long as it lives; a copy does not.
                images = collated.images.clone() if self._workers else collated.images
                yield Batch(images, torch.tensor(collated.labels), torch.tensor(collated.indices))
        if len(bad) == self.num_images:
            raise DataError(f"{self.dataset.name}: none of {len(bad)} images can be read; {bad[0].reason}")

    def _collated(self) -> Iterator[_Collated]:
        with _worker_errors(self._workers):
            with _start_of_workers() if self._workers else nullcontext():
                loader = DataLoader(
                    _Guarded(self.dataset),
                    batch_sampler=self._batches,
                    num_workers=self._workers,
                    collate_fn=_collate,
                    worker_init_fn=_ignore_interrupts,
                    generator=torch.Generator(),  # the default one would advance torch's global state
                )
                batches = iter(loader)
            try:
                yield from batches
            finally:
                # Workers end with their iterator, which the traceback of an error would keep alive.
                end_workers = getattr(batches, "_shutdown_workers", None)
                if end_workers is not None:
                    end_workers()

    def _mismatch(self, first: int, other: int) -> str:
        sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (self.dataset[first][0], self.dataset[other][0])]
        return (
            f"{self.dataset.path_of(other)}: is {sizes[1]} after preprocessing, but "
            f"{self.dataset.path_of(first)} is {sizes[0]}; make them equal with --crop"
        )


def make_loader(
    dataset: ImageDataset, *, batch_size: int, workers: int, indices: Sequence[int] | None = None
) -> Loader:
    """Batches of some images of a dataset, in the order of indices.

    Args:
        dataset: where the images are from.
        batch_size: images per batch, at least 1; the last batch may have fewer.
        workers: how many processes read images; 0 reads them in this one.
        indices: the numbers of the images, or None for all.

    Raises:
        ValueError: if batch_size or workers is out of its range.
        DataError: if there are no images.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1, workers {workers} at least 0")
    chosen = range(len(dataset)) if indices is None else indices
    if len(chosen) == 0:
        raise DataError(f"{dataset.name}: no images")
    return Loader(dataset, chosen, batch_size, workers)


class _Guarded(Dataset[Sample | _BadImage]):
    """A dataset that gives a _BadImage where the one inside raises DataError."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Sample | _BadImage:
        try:
            return self._dataset[index]
        except DataError as error:
            return _BadImage(self._dataset.path_of(index), str(error))


def _collate(samples: list[Sample | _BadImage]) -> _Collated:
    bad = [sample for sample in samples if isinstance(sample, _BadImage)]
    good = [sample for sample in samples if not isinstance(sample, _BadImage)]
    if not good:
        return _Collated(bad_images=bad)
    first_image, _, first_index = good[0]
    other = next((index for image, _, index in good if image.shape != first_image.shape), None)
    if other is not None:
        return _Collated(bad_images=bad, other_size=(first_index, other))
    images, labels, indices = zip(*good, strict=True)
    return _Collated(torch.stack(images), list(labels), list(indices), bad)


@contextmanager
def _start_of_workers() -> Iterator[None]:
    """Start processes without being interrupted, and leave signal handlers as they were.

    Ctrl-C waits until the block ends; workers forked in it take the waiting handler along. Torch
    installs a SIGCHLD handler that raises wherever the program happens to be when a worker dies;
    without it, the iterator finds out within seconds.
    """
    interrupts: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are fewer cores than workers, which is allowed
        if threading.current_thread() is not threading.main_thread():  # only that one handles signals
            yield
            return
        on_child = signal.getsignal(signal.SIGCHLD)
        on_interrupt = signal.signal(signal.SIGINT, lambda number, _frame: interrupts.append(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, on_child)
            signal.signal(signal.SIGINT, on_interrupt)
    if interrupts:
        signal.raise_signal(signal.SIGINT)


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the one that the user started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _worker_errors(workers: int) -> Iterator[None]:
    """Turn what torch raises about a dead worker process into a DataError."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if workers == 0 or str(error).startswith("Caught "):  # raised by the dataset: not about a process
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"a process that reads images failed: {reason}; "
            "if memory ran out, use fewer --workers or a smaller --batch-size"
        ) from error
