"""What every dataset is: numbered images with labels, as the tensors that a model expects."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qtool.data.preprocessing import Preprocessing
from qtool.errors import DataError

Sample = tuple[Tensor, int, int]
IMAGE_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ReadOptions:
    """How images are read, whatever kind of dataset they are from.

    Attributes:
        preprocessing: one mean and std per channel.
        channels: what the model takes: 1 (grey) or 3 (RGB).
        classes: the file that gives folders their class, or None.
        skip_bad_images: whether a loader leaves out an image that cannot be read.
    """

    preprocessing: Preprocessing
    channels: int = 3
    classes: Path | None = None
    skip_bad_images: bool = False


class ImageDataset(Dataset[Sample], ABC):
    """Images numbered from 0, each with the number of its class.

    Attributes:
        name: what to call it in a report, such as "imagenet-nips2017" or "cifar10 test".
        split: the part that was asked for, such as "evaluation" or "train".
        labels: the class of each image, int64, shape (N,).
        num_classes: how many classes it has by design; None if only the labels can tell.
        skip_bad_images: whether a loader leaves out an image that cannot be read.
    """

    def __init__(
        self, name: str, split: str, labels: Sequence[int], num_classes: int | None, options: ReadOptions
    ) -> None:
        self.name = name
        self.split = split
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.num_classes = num_classes
        self.skip_bad_images = options.skip_bad_images
        self._mode = IMAGE_MODES[options.channels]
        self._transform = options.preprocessing.transform()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        """Image number index as a float32 tensor (C, H, W), its label, and index again.

        Raises:
            DataError: if the image cannot be read.
        """
        image = self.image(index)
        try:
            x = self._transform(image)
        except (MemoryError, ValueError) as error:  # an image of 1 x 100000 pixels, for example
            size = f"{image.width}x{image.height}"
            raise DataError(
                f"{self.path_of(index)}: an image of {size} cannot be resized: {error}"
            ) from error
        return x, int(self.labels[index]), index

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image number index, before preprocessing, of the mode that the model takes.

        Raises:
            DataError: if it cannot be read.
        """

    @abstractmethod
    def path_of(self, index: int) -> str:
        """Where image number index is: its file, or "FILE.npz#12"."""

    def identity(self, index: int) -> str:
        """What two datasets have in common if and only if they hold the same stored image."""
        return self.path_of(index)
