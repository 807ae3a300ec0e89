"""CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST, from the files that torchvision keeps."""

from pathlib import Path

import numpy as np
from torchvision import datasets

from qtool.data.arrays import ArrayDataset, StoredImages
from qtool.data.image_dataset import ReadOptions
from qtool.data.kinds import TORCHVISION_FOLDERS, readable, torchvision_root
from qtool.errors import DataError

CLASSES = {
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "mnist": 10, "fashion-mnist": 10}
PARTS = {"evaluation": "test", "test": "test", "calibration": "train", "train": "train"}


def open_torchvision(kind: str, path: Path | None, split: str, options: ReadOptions) -> ArrayDataset:
    """Read one of these datasets into memory; nothing is downloaded.

    Args:
        kind: one of CLASSES.
        path: the root given to torchvision, or the folder of the dataset in it.
        split: "evaluation" or "test", "calibration" or "train".
        options: how to read the images.

    Raises:
        DataError: if files are missing or damaged, or there is no such part.
    """
    if path is None:
        raise DataError(f"{kind}: no DATA given; name the folder that holds {TORCHVISION_FOLDERS[kind]}")
    if split not in PARTS:
        raise DataError(f"{path}: {kind} has no {split!r} part; it has train and test")
    with readable(path):
        path.stat()
        root = torchvision_root(path, kind)
    if root is None:
        raise DataError(f"{path}: no {kind} found; looked for {path / TORCHVISION_FOLDERS[kind]}")
    part = PARTS[split]
    folder = root / TORCHVISION_FOLDERS[kind]
    try:
        stored = CLASSES[kind](str(root), train=part == "train", download=False)
        pixels, labels = np.asarray(stored.data), np.asarray(stored.targets)
    # torchvision raises RuntimeError for files it misses, and whatever its parsers meet in damaged ones.
    except Exception as error:
        raise DataError(f"{folder}: the files of {kind} are missing or damaged; copy them again") from error
    if len(pixels) != len(labels) or len(labels) == 0 or int(labels.max()) >= NUM_CLASSES[kind]:
        raise DataError(f"{folder}: images and labels do not belong together; copy the files again")
    rows = StoredImages(pixels, f"{folder.resolve()}/{part}", range(len(pixels)))
    return ArrayDataset(f"{kind} {part}", split, rows, labels.tolist(), NUM_CLASSES[kind], options)
