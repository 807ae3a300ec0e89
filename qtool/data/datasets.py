"""Open a dataset of any kind, and check that it fits a model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from qtool.data.arrays import open_digits, open_npz
from qtool.data.folder import FolderDataset, open_folder
from qtool.data.image_dataset import IMAGE_MODES, ImageDataset, ReadOptions
from qtool.data.kinds import dataset_kind
from qtool.data.preprocessing import Preprocessing
from qtool.data.torchvision_sets import open_torchvision
from qtool.errors import ConfigError, DataError


def _open_folder(path: Path | None, split: str, options: ReadOptions) -> FolderDataset:
    if path is None:
        raise DataError("folder: no DATA given; name a folder of class folders")
    return open_folder(path, split, options)


OPENERS: dict[str, Callable[[Path | None, str, ReadOptions], ImageDataset]] = {
    "folder": _open_folder,
    "cifar10": partial(open_torchvision, "cifar10"),
    "cifar100": partial(open_torchvision, "cifar100"),
    "mnist": partial(open_torchvision, "mnist"),
    "fashion-mnist": partial(open_torchvision, "fashion-mnist"),
    "npz": open_npz,
    "digits": open_digits,
}


def open_dataset(
    path: Path | None,
    kind: str | None,
    split: str = "evaluation",
    *,
    preprocessing: Preprocessing,
    classes: Path | None = None,
    skip_bad_images: bool = False,
    channels: int = 3,
) -> ImageDataset:
    """Open one part of a dataset; images are read when they are asked for.

    Args:
        path: what the user called DATA; None stands for the built-in digits.
        kind: one of kinds.KINDS, or None to tell by the content of path.
        split: "evaluation" (val/ or test/ of a folder, the test images of the others),
            "calibration" (images of the same dataset that the evaluation leaves alone), or the
            name of a part: "train", "val", "test", "calibration".
        preprocessing: how an image becomes a tensor.
        classes: for a folder, the file that gives class folders their class.
        skip_bad_images: whether a loader leaves out images that cannot be read.
        channels: what the model takes, 1 (images become grey) or 3 (RGB).

    Raises:
        ConfigError: if kind is unknown, preprocessing has values for other channels, or classes is
            given for what is not a folder.
        DataError: if the dataset or the part is missing or damaged, or the model takes no images.
    """
    kind = dataset_kind(path, kind)
    if channels not in IMAGE_MODES:
        raise DataError(f"{path or kind}: images have 1 or 3 channels, but the model takes {channels}")
    if classes is not None and kind != "folder":
        raise ConfigError(f"--classes: only an image folder has class names, not {kind}; leave it out")
    options = ReadOptions(preprocessing.for_channels(channels), channels, classes, skip_bad_images)
    return OPENERS[kind](path, split, options)


def check_outputs(dataset: ImageDataset, num_outputs: int) -> None:
    """Refuse a dataset whose labels cannot be outputs of the model.

    Args:
        dataset: any.
        num_outputs: how many classes the model tells apart.

    Raises:
        DataError: if a label is num_outputs or more, or the dataset has another number of classes.
    """
    found = dataset.num_classes
    if found is not None and found != num_outputs:
        if isinstance(dataset, FolderDataset):
            raise DataError(
                f"{dataset.name}: {found} class folders, but the model has {num_outputs} outputs; "
                f"say which class each folder is with --classes FILE, or pass --num-classes {found}"
            )
        raise DataError(
            f"{dataset.name}: {found} classes, but the model has {num_outputs} outputs; "
            "this is the wrong dataset for the model"
        )
    worst = int(dataset.labels.argmax())
    label = int(dataset.labels[worst])
    if label >= num_outputs:
        raise DataError(
            f"{dataset.path_of(worst)}: its class is {label}, but the model has {num_outputs} outputs, "
            f"0 to {num_outputs - 1}; this is the wrong dataset or --classes file for the model"
        )
