"""A dataset is told by its content, and its parts by their names."""

import os
from pathlib import Path

import pytest

from qtool.data.kinds import (
    dataset_kind,
    folder_part,
    has_calibration_split,
    has_training_split,
    torchvision_root,
)
from qtool.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("below", "kind"),
    [
        ("cifar-10-batches-py", "cifar10"),
        ("cifar-100-python", "cifar100"),
        ("MNIST/raw", "mnist"),
        ("FashionMNIST/raw", "fashion-mnist"),
        ("cats", "folder"),
    ],
)
def test_folder_is_told_by_content(tmp_path, below, kind):
    (tmp_path / below).mkdir(parents=True)
    assert dataset_kind(tmp_path) == kind


@pytest.mark.parametrize("given", ["", "FashionMNIST", "FashionMNIST/raw"])
def test_root_is_found_from_inside(tmp_path, given):
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    assert dataset_kind(tmp_path / given) == "fashion-mnist"
    assert torchvision_root(tmp_path / given, "fashion-mnist") == tmp_path


def test_root_is_found_from_a_relative_path(chdir_tmp):
    (chdir_tmp / "MNIST/raw").mkdir(parents=True)
    assert dataset_kind(Path("MNIST")) == "mnist"


def test_npz_is_told_by_its_ending(tmp_path):
    (tmp_path / "a.NPZ").touch()
    assert dataset_kind(tmp_path / "a.NPZ") == "npz"


def test_given_kind_needs_no_look(tmp_path):
    assert dataset_kind(tmp_path / "missing", "imagenet") == "folder"


def test_unknown_kind_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown kind of dataset 'cifar'; did you mean 'cifar10'"):
        dataset_kind(None, "cifar")


def test_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such file or folder$"):
        dataset_kind(tmp_path / "gone")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_forbidden_folder_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(DataError, match=r"cannot be read: permission denied"):
        dataset_kind(tmp_path / "locked" / "images")


def test_other_file_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt: is a file; DATA is a folder"):
        dataset_kind(tmp_path / "a.txt")


def test_two_datasets_in_one_root_are_ambiguous(tmp_path):
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "FashionMNIST/raw").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds mnist and fashion-mnist; name the folder of one"):
        dataset_kind(tmp_path)
    assert dataset_kind(tmp_path / "MNIST") == "mnist"


@pytest.mark.parametrize(
    ("parts", "split", "found"),
    [
        (["train/a", "val/a", "test/a"], "evaluation", "val"),
        (["train/a", "test/a"], "evaluation", "test"),
        (["a", "b"], "evaluation", "."),
        (["test", "a"], "evaluation", "."),  # a class called "test"
        (["train/a", "val/a"], "calibration", "train"),
        (["train/a", "val/a", "calibration/a"], "calibration", "calibration"),
        (["train/a", "val/a"], "train", "train"),
        (["extra/a"], "extra", "extra"),
    ],
)
def test_part_is_found(tmp_path, parts, split, found):
    for part in parts:
        (tmp_path / part).mkdir(parents=True)
    assert folder_part(tmp_path, split) == tmp_path / found


@pytest.mark.parametrize(
    ("parts", "split", "message"),
    [
        (["train/a"], "evaluation", "no val/ or test/ for evaluation; it has train/"),
        (["a"], "calibration", "no calibration/ or train/ for calibration; it is not split into parts"),
        (["val/a", "train/a"], "test", "no test/ for test; it has train/, val/"),
    ],
)
def test_missing_part_is_named(tmp_path, parts, split, message):
    for part in parts:
        (tmp_path / part).mkdir(parents=True)
    with pytest.raises(DataError) as error:
        folder_part(tmp_path, split)
    assert str(error.value) == f"{tmp_path}: {message}"


@pytest.mark.parametrize(
    ("below", "own"),
    [("train/a", True), ("calibration/a", True), ("val/a", False), ("a", False), ("MNIST/raw", True)],
)
def test_own_calibration_images_are_found(tmp_path, below, own):
    (tmp_path / below).mkdir(parents=True)
    assert has_calibration_split(tmp_path) is own


def test_only_digits_calibrate_without_a_path(tmp_path):
    (tmp_path / "a.npz").touch()
    assert has_calibration_split(None)
    assert not has_calibration_split(None, "npz")
    assert not has_calibration_split(tmp_path / "a.npz")
    assert not has_calibration_split(tmp_path / "a.npz", "folder")


@pytest.mark.parametrize(
    ("parts", "own"), [(["train", "val"], True), (["calibration", "val"], False), ([], False)]
)
def test_a_folder_has_training_images_where_it_has_that_part(tmp_path, parts, own):
    for part in parts or ["."]:
        (tmp_path / part / "cat").mkdir(parents=True)
    assert has_training_split(tmp_path) is own
    assert has_training_split(None) and not has_training_split(tmp_path / "a.npz", "npz")
