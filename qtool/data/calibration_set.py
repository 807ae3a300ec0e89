"""Which images calibrate."""

import math
from collections.abc import Iterable

import numpy as np

from qtool.data.image_dataset import ImageDataset
from qtool.errors import ConfigError, DataError


def calibration_indices(
    num_images: int, *, fraction: float | None = None, samples: int | None = None, seed: int = 0
) -> list[int]:
    """Choose images at random: the same ones for the same seed, whatever the batch size.

    Args:
        num_images: how many there are, at least 1.
        fraction: how many to take, as a part of them, 0 < fraction <= 1, rounded down to at least one image.
        samples: how many to take, 1 to num_images; wins over fraction. All are taken if both are None.
        seed: 0 to 2**32 - 1.

    Returns:
        Their numbers, ascending.

    Raises:
        ConfigError: if fraction, samples or seed is out of its range.
        DataError: if there are fewer images than samples.

    Example:
        >>> calibration_indices(10, fraction=0.3)
        [2, 4, 8]
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"calibration fraction {fraction} is not in the range 0<x<=1")
    if samples is not None and samples < 1:
        raise ConfigError(f"calibration samples {samples} is not in the range x>=1")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} is not in the range 0<=x<2**32")
    if samples is not None and samples > num_images:
        raise DataError(f"{samples} calibration samples asked for, but there are only {num_images} images")
    # Rounded first, because 0.29 * 100 is 28.999999999999996.
    part = num_images if fraction is None else max(1, math.floor(round(fraction * num_images, 6)))
    chosen = np.random.RandomState(seed).permutation(num_images)[: part if samples is None else samples]
    return sorted(chosen.tolist())


def overlap(a: ImageDataset, a_indices: Iterable[int], b: ImageDataset, b_indices: Iterable[int]) -> int:
    """How many images of a are also among those of b: the same file, or the same row of a file."""
    in_a = {a.identity(index) for index in a_indices}
    return len(in_a & {b.identity(index) for index in b_indices})
