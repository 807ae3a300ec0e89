"""The calibration images are chosen by the seed alone, and found again among others."""

from itertools import pairwise

import numpy as np
import pytest

from qtool.data.calibration_set import calibration_indices, overlap
from qtool.data.datasets import open_dataset
from qtool.errors import ConfigError, DataError


def test_choice_is_a_sorted_start_of_the_permutation():
    expected = sorted(np.random.RandomState(3).permutation(50)[:7])
    assert calibration_indices(50, samples=7, seed=3) == expected


@pytest.mark.parametrize(
    ("num_images", "fraction", "count"),
    [(1000, 0.1, 100), (100, 0.29, 29), (19, 0.1, 1), (5, 0.01, 1), (7, 1, 7)],
)
def test_fraction_rounds_down_to_at_least_one(num_images, fraction, count):
    chosen = calibration_indices(num_images, fraction=fraction)
    assert len(set(chosen)) == len(chosen) == count


def test_samples_win_over_fraction():
    assert len(calibration_indices(10, fraction=0.5, samples=2)) == 2


def test_all_images_are_the_default():
    assert calibration_indices(4) == [0, 1, 2, 3]


def test_more_samples_than_images_are_refused():
    with pytest.raises(DataError, match=r"^11 calibration samples asked for, but there are only 10 images$"):
        calibration_indices(10, samples=11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "calibration fraction 0.0 is not in the range 0<x<=1"),
        ({"fraction": 1.5}, "calibration fraction 1.5 is not in the range 0<x<=1"),
        ({"samples": 0}, "calibration samples 0 is not in the range x>=1"),
        ({"seed": -1}, "seed -1 is not in the range 0<=x<2**32"),
    ],
)
def test_value_out_of_range_is_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        calibration_indices(10, **arguments)
    assert str(error.value) == message


def test_overlap_follows_links_to_the_same_file(write_images, plain):
    root = write_images("set/a/1.png", "set/a/2.png")
    (root / "link").symlink_to(root / "set")
    one, two = (open_dataset(root / name, None, preprocessing=plain) for name in ("set", "link"))
    assert overlap(one, [0, 1], two, [1]) == 1


def test_parts_of_digits_do_not_overlap(plain):
    parts = [
        open_dataset(None, None, split, preprocessing=plain) for split in ("train", "calibration", "test")
    ]
    assert sum(len(part) for part in parts) == 1797
    assert not any(overlap(a, range(len(a)), b, range(len(b))) for a, b in pairwise(parts))
    assert overlap(parts[1], range(10), parts[1], range(5, 20)) == 5
