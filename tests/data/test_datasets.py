"""A dataset that does not fit the model is refused before anything is computed."""

import numpy as np
import pytest

from qtool.data.datasets import OPENERS, check_outputs, open_dataset
from qtool.data.kinds import KINDS
from qtool.errors import ConfigError, DataError


def test_every_kind_can_be_opened():
    assert set(OPENERS) == set(KINDS)


@pytest.mark.parametrize("num_outputs", [9, 1000])
def test_wrong_number_of_digits_is_refused(plain, num_outputs):
    digits = open_dataset(None, None, preprocessing=plain)
    check_outputs(digits, 10)
    with pytest.raises(DataError) as error:
        check_outputs(digits, num_outputs)
    assert str(error.value) == (
        f"digits test: 10 classes, but the model has {num_outputs} outputs; "
        "this is the wrong dataset for the model"
    )


def test_wrong_number_of_folders_says_what_to_do(write_images, plain):
    folder = open_dataset(write_images("a/1.png", "b/1.png"), None, preprocessing=plain)
    check_outputs(folder, 2)
    with pytest.raises(
        DataError,
        match=r": 2 class folders, but the model has 1000 outputs; .* --classes FILE, .* --num-classes 2$",
    ):
        check_outputs(folder, 1000)


def test_classes_file_allows_fewer_folders_than_outputs(write_images, plain):
    root = write_images("a/1.png")
    (root / "classes.txt").write_text("7 a\n", encoding="utf-8")
    folder = open_dataset(root, None, preprocessing=plain, classes=root / "classes.txt")
    check_outputs(folder, 8)
    with pytest.raises(
        DataError, match=r"1\.png: its class is 7, but the model has 7 outputs, 0 to 6; .*--classes file"
    ):
        check_outputs(folder, 7)


def test_label_beyond_the_outputs_is_refused(tmp_path, plain):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), dtype=np.uint8), labels=[0, 10])
    dataset = open_dataset(tmp_path / "a.npz", None, preprocessing=plain)
    check_outputs(dataset, 1000)
    with pytest.raises(DataError, match=r"a\.npz#1: its class is 10, but the model has 10 outputs"):
        check_outputs(dataset, 10)


def test_classes_file_needs_a_folder(tmp_path, plain):
    with pytest.raises(ConfigError, match=r"^--classes: only an image folder has class names, not digits"):
        open_dataset(None, None, preprocessing=plain, classes=tmp_path / "classes.txt")


def test_folder_needs_a_path(plain):
    with pytest.raises(DataError, match=r"^folder: no DATA given; name a folder of class folders$"):
        open_dataset(None, "imagenet", preprocessing=plain)


def test_model_must_take_images(plain):
    with pytest.raises(DataError, match=r"^digits: images have 1 or 3 channels, but the model takes 4$"):
        open_dataset(None, None, preprocessing=plain, channels=4)
