"""Images held in memory: .npz files and the built-in digits."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from PIL import Image

from qtool.data.image_dataset import ImageDataset, ReadOptions
from qtool.data.kinds import readable
from qtool.errors import DataError

Pixels = NDArray[np.uint8]

# Digit i belongs to the part whose residues hold i % 10.
DIGITS_PARTS = {"train": range(0, 5), "calibration": range(5, 7), "test": range(7, 10)}


@dataclass(frozen=True)
class StoredImages:
    """Some rows of an array of images.

    Attributes:
        pixels: uint8, shape (N, H, W, 3) or (N, H, W).
        source: where the array is from; path_of names it before the number of the row.
        rows: the rows that belong to the dataset.
        white: the pixel value that becomes 1.0.
    """

    pixels: Pixels
    source: str
    rows: Sequence[int]
    white: int = 255


class ArrayDataset(ImageDataset):
    """Images held in memory, in the order of stored.rows."""

    def __init__(
        self,
        name: str,
        split: str,
        stored: StoredImages,
        labels: Sequence[int],
        num_classes: int | None,
        options: ReadOptions,
    ) -> None:
        super().__init__(name, split, labels, num_classes, options)
        self._stored = stored

    def image(self, index: int) -> Image.Image:
        pixels = self._stored.pixels[self._stored.rows[index]]
        if self._stored.white == 255:
            return Image.fromarray(pixels).convert(self._mode)
        # A float image, which stays grey, keeps every fraction of white exact.
        return Image.fromarray(pixels.astype(np.float32) / np.float32(self._stored.white))

    def path_of(self, index: int) -> str:
        return f"{self._stored.source}#{self._stored.rows[index]}"


def open_digits(path: Path | None, split: str, options: ReadOptions) -> ArrayDataset:
    """The built-in 8x8 digits of ten classes; pixels are scaled from 0..16 to [0, 1].

    Args:
        path: None, as they come with qtool.
        split: "evaluation" (which is test), "train", "calibration" or "test".
        options: how to read the images.

    Raises:
        DataError: if there is no such part, or a path was given.
    """
    if path is not None:
        raise DataError(f"{path}: the digits come with qtool; leave DATA out")
    part = "test" if split == "evaluation" else split
    if part not in DIGITS_PARTS:
        raise DataError(f"digits: no {split!r} part; it has {', '.join(DIGITS_PARTS)}")
    with resources.files("qtool.data").joinpath("digits.npz").open("rb") as file, np.load(file) as archive:
        pixels, labels = archive["images"], archive["labels"]
    rows = [i for i in range(len(pixels)) if i % 10 in DIGITS_PARTS[part]]
    stored = StoredImages(pixels, "digits", rows, white=16)
    return ArrayDataset(f"digits {part}", split, stored, labels[rows].tolist(), 10, options)


def open_npz(path: Path | None, split: str, options: ReadOptions) -> ArrayDataset:
    """The images and labels of an .npz file, which has one part only.

    Args:
        path: an archive with `images`, uint8 (N, H, W, 3) or (N, H, W), and `labels`, integers (N,).
        split: "evaluation".
        options: how to read the images.

    Raises:
        DataError: if the file cannot be read, is malformed, or another part is asked for.
    """
    if path is None:
        raise DataError("npz: no DATA given; name the .npz file")
    if split != "evaluation":
        raise DataError(f"{path}: no {split!r} part; an .npz file has only one part")
    images, labels = read_npz(path)
    stored = StoredImages(images, str(path.resolve()), range(len(images)))
    return ArrayDataset(path.name, split, stored, labels.tolist(), None, options)


def read_npz(path: Path) -> tuple[Pixels, NDArray[np.int64]]:
    """Read images, uint8 (N, H, W, 3) or (N, H, W), and labels, int64 (N,), none of them negative.

    Raises:
        DataError: if the file is anything else.
    """
    images, labels = _load_arrays(path)
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (grey or colour):
        raise DataError(
            f"{path}: images is {images.dtype} {images.shape}; it should be uint8 (N, H, W, 3) or (N, H, W)"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{path}: labels is {labels.dtype} {labels.shape}; it should be integers (N,)")
    if len(images) != len(labels):
        raise DataError(
            f"{path}: {len(images)} images, but {len(labels)} labels; there should be one for each"
        )
    if images.size == 0:
        raise DataError(f"{path}: images is empty, {images.shape}; there should be at least one")
    if int(labels.min()) < 0 or int(labels.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: labels go from {labels.min()} to {labels.max()}; classes are 0 or more")
    return images, labels.astype(np.int64)


def _load_arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    with readable(path), path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            names = archive.files if isinstance(archive, NpzFile) else None
            if names is not None and {"images", "labels"} <= set(names):
                return archive["images"], archive["labels"]
        # NumPy and zipfile raise ValueError, BadZipFile, zlib.error and many more on a damaged file.
        except Exception as error:
            raise DataError(f"{path}: is not a whole .npz file: {error}") from error
    if names is None:
        raise DataError(f"{path}: is a single array; an .npz file has images and labels")
    missing = [name for name in ("images", "labels") if name not in names]
    found = ", ".join(sorted(names)) or "nothing"
    raise DataError(f"{path}: no array {missing[0]!r}; found {found}; needs images and labels")
