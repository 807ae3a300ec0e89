"""Images for training: in what order they come, and how they are changed, by seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# How far an image is moved at most, as a share of its side: 4 of 32 pixels, as is usual for CIFAR.
LARGEST_SHIFT = 1 / 8


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images of a step.

    Args:
        flip: whether each is mirrored, left to right, with probability 0.5.
        crop: whether each is moved, by up to an eighth of its sides; what comes in from outside is black.
        black: value of black in each channel, as the network takes images.
        seed: of all that is random.
    """

    flip: bool
    crop: bool
    black: tuple[float, ...]
    seed: int = 0

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """The images of a step, (N, C, H, W), as it sees them; the same for the same seed and step."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, step))
        if self.crop:
            largest = [max(1, round(side * LARGEST_SHIFT)) for side in images.shape[2:]]
            shifts = torch.stack(
                [torch.randint(-n, n + 1, (len(images),), generator=generator) for n in largest], dim=1
            )
            images = shifted(images, shifts, torch.tensor(self.black))
        if self.flip:
            chosen = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(chosen.reshape(-1, 1, 1, 1), images.flip(3), images)
        return images


def shifted(images: Tensor, shifts: Tensor, black: Tensor) -> Tensor:
    """Each image moved down and to the right, black where nothing of it is.

    Args:
        images: (N, C, H, W).
        shifts: (N, 2), whole numbers of pixels, negative for up and left.
        black: (C,).

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> shifted(x, torch.tensor([[1, 0]]), torch.tensor([-9.0]))
        tensor([[[[-9., -9.],
                  [ 0.,  1.]]]])
    """
    result = black.reshape(1, -1, 1, 1).expand_as(images).contiguous()
    height, width = images.shape[2:]
    for here, image, (down, right) in zip(result, images, shifts.tolist(), strict=True):
        part = image[:, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
        here[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = part
    return result


def training_order(count: int, wanted: int, seed: int) -> list[int]:
    """Places among count images: all of them in an order of their own, again and again, wanted in all.

    The first ones do not depend on how many are wanted.

    Example:
        >>> training_order(3, 7, seed=0)
        [1, 2, 0, 1, 2, 0, 0]
    """
    found: list[int] = []
    epoch = 0
    while len(found) < wanted:
        found += np.random.RandomState(hash_of(seed, epoch)).permutation(count).tolist()
        epoch += 1
    return found[:wanted]


def hash_of(seed: int, number: int) -> int:
    """A seed for a numbered part of a run, below 2**32; other ones for other seeds and numbers."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
