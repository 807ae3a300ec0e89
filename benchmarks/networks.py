"""The pretrained networks and pictures that several benchmarks measure on, in memory.

`QTOOL_DATA` names the folder of test data. Splits of the ImageNet networks:

    nips    256 images of imagenet-sample calibrate (seed 0), the 1,000 of imagenet-nips2017 evaluate
    peers   imagenet-sample in the order of its paths, numpy.random.RandomState(0).permutation(1000): the
            first 256 calibrate, the other 744 evaluate

and of the CIFAR-10 networks: the first 512 (nips) or 256 (peers) images of train-5085 calibrate, the 1,017 of
test-1017 evaluate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from qtool.config import load_config
from qtool.data.calibration_set import calibration_indices
from qtool.data.image_dataset import ImageDataset
from qtool.pipeline.inputs import open_evaluation, open_subject

IMAGENET = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_1")
CIFAR = ("resnet20", "resnet56", "resnet20_distiller")
NON_COMMERCIAL = (
    "The weights of resnet18 and resnet50 are under a non-commercial licence: github "
    "uber-research/permute-quantize-finetune, Uber Non-Commercial License."
)
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """A float network with its images.

    Args:
        name: of the network.
        traced: the network.
        calibration: batches of images.
        images: batches to evaluate on.
        labels: of all of these, (N,).
    """

    name: str
    traced: fx.GraphModule
    calibration: list[Tensor]
    images: list[Tensor]
    labels: Tensor

    def logits(self, network: torch.nn.Module) -> Tensor:
        """The network's outputs for all images, (N, classes)."""
        with torch.no_grad():
            return torch.cat([network(batch) for batch in self.images])


def data_folder() -> Path:
    """Where the test data lies."""
    return Path(os.environ.get("QTOOL_DATA", "../shared/data"))


def load(name: str, split: str = "nips") -> Subject:
    """A network and the images of a split."""
    data = data_folder()
    cifar = name in CIFAR
    folder = data / ("cifar10" if cifar else "weights")
    sets = (
        (data / "cifar10" / "test-1017.npz", data / "cifar10" / "train-5085.npz")
        if cifar
        else (data / "imagenet-nips2017", data / "imagenet-sample")
    )
    options = {"crop": 225} if name == "mobilenet_v2" else {}
    options |= {} if cifar else {"classes": data / "imagenet-classes.txt"}
    config = load_config(arch=name, checkpoint=folder / f"{name}.pth", path=sets[0], **options)
    subject = open_subject(config)
    tested = open_evaluation(config, subject).dataset
    found = open_evaluation(replace(config, data=replace(config.data, path=sets[1])), subject).dataset
    evaluate_on = list(range(len(tested)))
    if cifar:
        chosen = list(range(512 if split == "nips" else 256))
    elif split == "nips":
        chosen = calibration_indices(len(found), samples=256)
    else:
        tested = found
        by_path = sorted(range(len(found)), key=found.path_of)
        order = [by_path[place] for place in np.random.RandomState(0).permutation(1000)]
        chosen, evaluate_on = order[:256], order[256:]
    images, labels = _loaded(tested, evaluate_on)
    return Subject(name, subject.traced(), _loaded(found, chosen)[0], images, labels)


def _loaded(dataset: ImageDataset, indices: list[int]) -> tuple[list[Tensor], Tensor]:
    items = [dataset[index] for index in indices]
    images = torch.stack([torch.as_tensor(image) for image, *_ in items])
    return list(images.split(BATCH)), torch.tensor([int(label) for _, label, *_ in items])
