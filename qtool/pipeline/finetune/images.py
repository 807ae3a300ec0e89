"""The images that a network is trained on: which, in what order, and which are held out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qtool.config import Config
from qtool.config.sections.finetuning import AUTO, CROP, FLIP, FLIP_CROP
from qtool.data.augmentation import Augmentation, training_order
from qtool.data.calibration_set import calibration_indices, overlap
from qtool.data.datasets import check_outputs
from qtool.data.image_dataset import ImageDataset
from qtool.data.kinds import has_training_split
from qtool.data.loader import Batch
from qtool.errors import ConfigError, DataError
from qtool.pipeline.inputs import Images, Subject, classes_for, open_images
from qtool.pipeline.passes import note_bad_images

LOG = logging.getLogger("qtool")

# More would only cost time.
MOST_HELD_OUT = 1000
TRAIN = "train"


@dataclass(frozen=True)
class TrainingImages:
    """Training images, divided.

    Args:
        learn: those that are trained on.
        held_out: those that judge the result; None for none.
        augmentation: what is done to those of a step.
        words: how to speak of them.
    """

    learn: Images
    held_out: Images | None
    augmentation: Augmentation
    words: str

    def batches(self, config: Config, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """The batches of some steps, with their numbers, from 0; one of unreadable images is left out.

        Args:
            config: of the run.
            first, last: the first step, and the one behind the last.
        """
        size = config.data.batch_size
        order = training_order(len(self.learn.indices), last * size, config.run.seed)[first * size :]
        loader = self.learn.part(order).loader(config)
        for batch in loader:
            step = first + batch.number
            yield step, batch._replace(images=self.augmentation(batch.images, step))
        note_bad_images(loader.bad_images)

    def digest(self) -> str:
        """A hash of which images are trained on and held out, and of their labels."""
        found = hashlib.sha256()
        for part in (self.learn, self.held_out):
            for index in () if part is None else part.indices:
                line = f"{part.dataset.path_of(index)}\0{part.dataset.labels[index]}\n"  # type: ignore[union-attr]
                found.update(line.encode("utf-8", "surrogateescape"))
            found.update(b"\0")
        return found.hexdigest()


def with_training_calibration(config: Config) -> Config:
    """The settings with calibration images from --train-data, where nothing else says which."""
    asked, train = config.calibration, config.finetuning
    given = (asked.calib_data, asked.calib_split, asked.fraction, config.quantizers.stats_file)
    if train.train_data is None or any(value is not None for value in given):
        return config
    split = train.train_split or _part(config)
    calibration = replace(
        asked, calib_data=train.train_data, calib_split=split, calib_classes=train.train_classes
    )
    return replace(config, calibration=calibration)


def open_training(config: Config, subject: Subject, evaluation: Images) -> TrainingImages:
    """The training images, which may not be evaluated on.

    Raises:
        ConfigError: if there are none, or evaluation images are among them.
        DataError: if they cannot be read, do not fit the network, or are too few.
    """
    asked = config.finetuning
    dataset = _dataset(config, subject)
    if asked.distillation < 1:
        check_outputs(dataset, subject.num_outputs())
    everything = range(len(dataset))
    shared = overlap(evaluation.dataset, evaluation.indices, dataset, everything)
    if shared:
        raise ConfigError(
            f"--train-data: {shared} of the {len(evaluation.indices)} evaluation images are also training "
            f"images ({dataset.name}); train on others, or the accuracy means nothing"
        )
    count = min(round(asked.held_out * len(dataset)), MOST_HELD_OUT)
    if asked.held_out > 0 and not 0 < count < len(dataset):
        raise DataError(
            f"--held-out: {dataset.name} has {len(dataset)} images, too few to hold some of them out; "
            "name more, or pass --held-out 0"
        )
    held = calibration_indices(len(dataset), samples=count, seed=config.run.seed) if count else []
    learn = sorted(set(everything) - set(held))
    words = f"{len(learn)} of {len(dataset)} images of {dataset.name}"
    if held:
        words += f", {len(held)} held out (seed {config.run.seed})"
    images = Images(dataset, learn, words, subject.preprocessing)
    held_out = replace(images, indices=held) if held else None
    return TrainingImages(images, held_out, _augmentation(config, subject), words)


def _dataset(config: Config, subject: Subject) -> ImageDataset:
    asked, data = config.finetuning, config.data
    if asked.train_data is not None:
        classes = asked.train_classes or classes_for(asked.train_data, data.classes)
        return open_images(
            config, asked.train_data, None, asked.train_split or _part(config), subject, classes
        )
    if asked.train_classes is not None:
        raise ConfigError(
            "--train-classes: is of --train-data, which is not given; --classes is that of DATA"
        )
    if asked.train_split is None and not has_training_split(data.path, data.dataset):
        raise ConfigError(
            f"--train-data: {data.path} has no training images of its own; name a folder or file with some"
        )
    return open_images(config, data.path, data.dataset, asked.train_split or TRAIN, subject, data.classes)


def _part(config: Config) -> str:
    """The part of --train-data that is trained on: its training images, or all where it has no parts."""
    return TRAIN if has_training_split(config.finetuning.train_data) else "evaluation"


def _augmentation(config: Config, subject: Subject) -> Augmentation:
    asked = config.finetuning.augment
    if asked == AUTO:
        asked = FLIP_CROP if subject.input_shape[0] == 3 else ""
    preprocessing = subject.preprocessing
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    black = tuple((-mean / std).expand(subject.input_shape[0]).tolist())
    return Augmentation(asked in (FLIP, FLIP_CROP), asked in (CROP, FLIP_CROP), black, config.run.seed)
