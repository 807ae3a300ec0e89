"""Images in batches, read by worker processes; the batches do not depend on how many."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtool.data.image_dataset import ImageDataset, Sample
from qtool.data.workers import ordered_map
from qtool.errors import DataError


class Batch(NamedTuple):
    """Some images, in the order that was asked for."""

    images: Tensor
    """float32, shape (N, C, H, W)"""
    labels: Tensor
    """int64, shape (N,)"""
    indices: Tensor
    """int64, shape (N,): the numbers of the images in their dataset"""
    number: int
    """of this batch among those of all processes"""


@dataclass(frozen=True)
class _Read:
    """What a worker sends for one batch: arrays of the good images, and what is wrong with the others."""

    images: NDArray[np.float32] | None
    labels: list[int]
    indices: list[int]
    bad: dict[int, str]
    mismatch: str | None = None


class Loader:
    """Batches of the images of a dataset, the same ones in the same order at every iteration.

    Attributes:
        dataset: where the images are from.
        num_images: how many images were asked for.
        bad_images: the paths of the images that the last iteration left out.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: Sequence[int],
        batch_size: int,
        workers: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset = dataset
        self.bad_images: list[str] = []
        self._first, self._step = share
        batches = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        self._batches = batches[self._first :: self._step]
        self.num_images = sum(map(len, self._batches))
        self._workers = workers

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """Read the images, batch after batch; one whose images are all bad is passed over.

        Raises:
            DataError: if an image cannot be read (unless the dataset skips those), if none can, if
                the images of a batch differ in size, or if a worker process dies.
        """
        self.bad_images = []
        reason = ""
        reads = ordered_map(partial(_read_batch, self.dataset), self._batches, self._workers)
        for position, read in enumerate(reads):
            reason = reason or next(iter(read.bad.values()), "")
            if reason and not self.dataset.skip_bad_images:
                raise DataError(f"{reason}; replace the image or pass --skip-bad-images")
            if read.mismatch is not None:
                raise DataError(read.mismatch)
            self.bad_images += map(self.dataset.path_of, read.bad)
            if read.images is not None:
                images = torch.from_numpy(read.images)
                number = self._first + position * self._step
                yield Batch(images, torch.tensor(read.labels), torch.tensor(read.indices), number)
        if self.num_images and len(self.bad_images) == self.num_images:
            raise DataError(f"{self.dataset.name}: none of {self.num_images} images can be read; {reason}")


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int,
    indices: Sequence[int] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Loader:
    """Batches of some images of a dataset, in the order of indices.

    Args:
        dataset: where the images are from.
        batch_size: images per batch, at least 1; the last batch may have fewer.
        workers: how many processes read images; 0 reads them in this one.
        indices: the numbers of the images, or None for all.
        share: (k, n) for the batches number k, k + n, k + 2n, ...

    Raises:
        ValueError: if batch_size or workers is out of its range.
        DataError: if there are no images.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1, workers {workers} at least 0")
    chosen = range(len(dataset)) if indices is None else indices
    if len(chosen) == 0:
        raise DataError(f"{dataset.name}: no images")
    return Loader(dataset, chosen, batch_size, workers, share)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch from its threads, which slow down work on one image, and hang in a forked process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _read_batch(dataset: ImageDataset, indices: list[int]) -> _Read:
    good: list[Sample] = []
    bad: dict[int, str] = {}
    for index in indices:
        try:
            good.append(dataset[index])
        except DataError as error:
            bad[index] = str(error)
    if not good:
        return _Read(None, [], [], bad)
    images, labels, kept = zip(*good, strict=True)
    mismatch = _mismatch(dataset, images, kept)
    stacked = None if mismatch else torch.stack(images).numpy()
    return _Read(stacked, list(labels), list(kept), bad, mismatch)


def _mismatch(dataset: ImageDataset, images: Sequence[Tensor], indices: Sequence[int]) -> str | None:
    """What to tell the user if images differ in size and cannot be one batch; None if they do not."""
    for image, index in zip(images, indices, strict=True):
        if image.shape != images[0].shape:
            size, first = (f"{x.shape[2]}x{x.shape[1]}" for x in (image, images[0]))
            return (
                f"{dataset.path_of(index)}: is {size} after preprocessing, but "
                f"{dataset.path_of(indices[0])} is {first}; make them equal with --crop"
            )
    return None
