"""An image folder is read as torchvision's ImageFolder reads it, and says what it misses."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from qtool.data.datasets import open_dataset
from qtool.data.preprocessing import default_preprocessing
from qtool.errors import DataError


def test_order_and_classes_are_those_of_image_folder(write_images, plain):
    root = write_images("b/2.png", "b/10.JPEG", "a/z/1.bmp", "a/3.PNG", "c/x.png")
    (root / "a/notes.txt").touch()
    dataset = open_dataset(root, None, preprocessing=plain)
    found = [(dataset.path_of(i), dataset[i][1]) for i in range(len(dataset))]
    assert found == ImageFolder(str(root)).samples
    assert (dataset.name, dataset.num_classes) == (root.name, 3)


def test_pixels_are_those_of_image_folder(shared_data):
    folder = shared_data / "imagenet-sample"
    transform = default_preprocessing("folder", None)
    dataset = open_dataset(folder, None, preprocessing=transform)
    expected = ImageFolder(str(folder), transform.transform())
    for index in (0, 500, 999):
        x, label, number = dataset[index]
        assert (label, number) == (expected[index][1], index)
        assert torch.equal(x, expected[index][0])


def test_classes_file_gives_imagenet_labels(shared_data, plain):
    classes = shared_data / "imagenet-classes.txt"
    dataset = open_dataset(shared_data / "imagenet-nips2017", None, preprocessing=plain, classes=classes)
    lines = (shared_data / "imagenet-nips2017.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("class_index")
    # The columns before class_index hold no commas.
    expected = sorted(int(line.split(",")[column]) for line in lines[1:] if line)
    assert sorted(dataset.labels.tolist()) == expected


def test_evaluation_and_calibration_parts_are_found(write_images, plain):
    root = write_images("val/a/1.png", "train/a/1.png", "train/b/2.png")
    evaluation = open_dataset(root, None, preprocessing=plain)
    calibration = open_dataset(root, None, "calibration", preprocessing=plain)
    assert [len(evaluation), len(calibration)] == [1, 2]
    assert (evaluation.name, calibration.name) == (f"{root.name} val", f"{root.name} train")


def test_hidden_files_are_passed_over(write_images, plain):
    root = write_images("a/1.png", "a/.1.png", ".cache/1.png")
    dataset = open_dataset(root, None, preprocessing=plain)
    assert (len(dataset), dataset.num_classes) == (1, 1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_become_grey_or_rgb(write_images, plain, channels, mode):
    root = write_images("a/1.png")
    expected = np.asarray(Image.open(root / "a/1.png").convert(mode)).reshape(8, 8, channels) / np.float32(
        255
    )
    x, _, _ = open_dataset(root, None, preprocessing=plain, channels=channels)[0]
    assert np.array_equal(x.permute(1, 2, 0).numpy(), expected)


def test_empty_folder_says_what_was_looked_for(tmp_path, plain):
    with pytest.raises(
        DataError, match=r": no class folders; looked for CLASS/NAME with \.jpg, \.jpeg, \.png"
    ):
        open_dataset(tmp_path, None, preprocessing=plain)


def test_folder_without_images_says_so(tmp_path, plain):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r": 1 folders, but no image in them; looked for"):
        open_dataset(tmp_path, None, preprocessing=plain)


def test_file_is_no_folder(tmp_path, plain):
    (tmp_path / "a.npz").touch()
    with pytest.raises(DataError, match=r"a\.npz: is a file; an image folder has one subfolder per class"):
        open_dataset(tmp_path / "a.npz", "folder", preprocessing=plain)


def test_missing_folder_is_named(tmp_path, plain):
    with pytest.raises(DataError, match=r"gone: no such file or folder"):
        open_dataset(tmp_path / "gone", "folder", preprocessing=plain)


def test_folder_that_cannot_be_listed_is_named(write_images, plain, monkeypatch):
    root = write_images("a/1.png")

    def forbid(*_args, onerror, **_kwargs):
        onerror(PermissionError(13, "Permission denied", str(root / "a")))
        return []

    monkeypatch.setattr(os, "walk", forbid)
    with pytest.raises(DataError, match=r"a: cannot be read: permission denied$"):
        open_dataset(root, None, preprocessing=plain)


def test_folders_missing_from_the_classes_file_are_named(write_images, plain):
    root = write_images("a/1.png", "b/1.png", "c/1.png")
    (root / "classes.txt").write_text("0 a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"b: folder 'b' \(and 1 more folders\) is not in .*classes\.txt"):
        open_dataset(root, None, preprocessing=plain, classes=root / "classes.txt")


@pytest.mark.parametrize(
    ("name", "lost_bytes"), [("1.jpg", 1), ("1.jpg", 100), ("1.png", 100), ("1.bmp", 1), ("1.bmp", 100)]
)
def test_truncated_image_is_refused(write_images, plain, name, lost_bytes):
    root = write_images(f"a/{name}", size=(64, 64))
    path = root / "a" / name
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    with pytest.raises(DataError, match=rf"{name}: cannot be read: .*truncated"):
        open_dataset(root, None, preprocessing=plain)[0]


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_what_is_no_image_is_refused_in_one_line(write_images, plain, data):
    root = write_images("a/1.png")
    (root / "a/1.png").write_bytes(data)
    with pytest.raises(DataError, match=r"^[^\n]*1\.png: cannot be read: [^\n]*$"):
        open_dataset(root, None, preprocessing=plain)[0]


def test_broken_link_is_refused(write_images, plain):
    root = write_images("a/1.png")
    (root / "a/0.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"0\.png: cannot be read: no such file"):
        open_dataset(root, None, preprocessing=plain)[0]


def test_named_pipe_is_refused_without_waiting(write_images, plain):
    root = write_images("a/1.png")
    os.mkfifo(root / "a/0.png")
    with pytest.raises(DataError, match=r"0\.png: cannot be read: no such file"):
        open_dataset(root, None, preprocessing=plain)[0]


def test_suspiciously_large_image_is_refused(write_images, plain, monkeypatch):
    root = write_images("a/1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # the image has 64
    with pytest.raises(DataError, match=r"1\.png: cannot be read: Image size \(64 pixels\) exceeds limit"):
        open_dataset(root, None, preprocessing=plain)[0]


def test_image_that_cannot_be_resized_is_named(write_images, plain, monkeypatch):
    root = write_images("a/1.png")
    dataset = open_dataset(root, None, preprocessing=plain)

    def exhaust(_image):
        raise MemoryError("no memory")

    monkeypatch.setattr(dataset, "_transform", exhaust)
    with pytest.raises(DataError, match=r"1\.png: an image of 8x8 cannot be resized: no memory"):
        dataset[0]
