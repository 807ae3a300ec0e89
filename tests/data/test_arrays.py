"""Images in arrays keep their pixels, and a malformed .npz file is refused in one line."""

import numpy as np
import pytest
import torch

from qtool.data.arrays import read_npz
from qtool.data.datasets import open_dataset
from qtool.errors import DataError

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([3, 1])


@pytest.fixture
def npz(tmp_path):
    np.savez(tmp_path / "set.npz", images=IMAGES, labels=LABELS, names=np.array(["a", "b"]))
    return tmp_path / "set.npz"


def test_npz_keeps_pixels_and_labels(npz, plain):
    dataset = open_dataset(npz, None, preprocessing=plain)
    x, label, index = dataset[1]
    assert (dataset.name, label, index) == ("set.npz", 1, 1)
    assert np.array_equal(x.permute(1, 2, 0).numpy(), IMAGES[1] / np.float32(255))
    assert dataset.path_of(1) == f"{npz}#1"


def test_grey_npz_becomes_rgb(tmp_path, plain):
    np.savez(tmp_path / "set.npz", images=IMAGES[..., 0], labels=LABELS)
    x, _, _ = open_dataset(tmp_path / "set.npz", None, preprocessing=plain)[0]
    assert x.shape == (3, 4, 4)
    assert np.array_equal(x[2].numpy(), IMAGES[0, :, :, 0] / np.float32(255))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": LABELS, "labels": LABELS}, "no array 'images'; found labels, x; needs images and labels"),
        ({"images": IMAGES}, "no array 'labels'; found images; needs images and labels"),
        ({}, "no array 'images'; found nothing; needs images and labels"),
        (
            {"images": IMAGES / 255, "labels": LABELS},
            "images is float64 (2, 4, 4, 3); it should be uint8 (N, H, W, 3) or (N, H, W)",
        ),
        (
            {"images": IMAGES.transpose(0, 3, 1, 2), "labels": LABELS},
            "images is uint8 (2, 3, 4, 4); it should be uint8 (N, H, W, 3) or (N, H, W)",
        ),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels is float64 (2,); it should be integers (N,)"),
        (
            {"images": IMAGES, "labels": np.eye(2, dtype=int)},
            "labels is int64 (2, 2); it should be integers (N,)",
        ),
        ({"images": IMAGES, "labels": LABELS[:1]}, "2 images, but 1 labels; there should be one for each"),
        (
            {"images": IMAGES[:0], "labels": LABELS[:0]},
            "images is empty, (0, 4, 4, 3); there should be at least one",
        ),
        ({"images": IMAGES, "labels": -LABELS}, "labels go from -3 to -1; classes are 0 or more"),
    ],
)
def test_malformed_arrays_are_refused(tmp_path, arrays, message):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError) as error:
        read_npz(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("keep", [0, 1, 10, 200, -1])
def test_truncated_file_is_refused(npz, keep):
    npz.write_bytes(npz.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"^[^\n]*set\.npz: is not a whole \.npz file: [^\n]+$"):
        read_npz(npz)


def test_flipped_bit_is_found(npz):
    data = bytearray(npz.read_bytes())
    data[data.index(IMAGES.tobytes())] ^= 1
    npz.write_bytes(data)
    with pytest.raises(DataError, match=r"is not a whole \.npz file: Bad CRC-32"):
        read_npz(npz)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.array([{}], dtype=object), labels=LABELS)
    with pytest.raises(DataError, match=r"Object arrays cannot be loaded"):
        read_npz(tmp_path / "set.npz")


def test_single_array_is_refused(tmp_path):
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"is a single array; an \.npz file has images and labels"):
        read_npz(tmp_path / "set.npz")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.npz: no such file or folder"):
        read_npz(tmp_path / "gone.npz")


def test_npz_has_one_part(npz, plain):
    with pytest.raises(DataError, match=r"no 'train' part; an \.npz file has only one part"):
        open_dataset(npz, None, "train", preprocessing=plain)


def test_npz_needs_a_path(plain):
    with pytest.raises(DataError, match=r"^npz: no DATA given"):
        open_dataset(None, "npz", preprocessing=plain)


def test_cifar_file_is_read(shared_data, plain):
    dataset = open_dataset(shared_data / "cifar10/test-1017.npz", None, preprocessing=plain)
    assert len(dataset) == 1017
    assert sorted(set(dataset.labels.tolist())) == list(range(10))


def test_digits_are_exact_sixteenths(plain):
    dataset = open_dataset(None, None, preprocessing=plain, channels=1)
    images = torch.stack([dataset[i][0] for i in range(50)])
    assert images.shape == (50, 1, 8, 8)
    assert set((images * 16).unique().tolist()) == set(range(17))


def test_digits_fit_rgb_models(plain):
    x = open_dataset(None, None, preprocessing=plain)[0][0]
    assert x.shape == (3, 8, 8)
    assert bool((x[0] == x[2]).all())


def test_digits_keep_their_number(plain):
    dataset = open_dataset(None, "digits", preprocessing=plain)
    assert [dataset.path_of(i) for i in range(4)] == ["digits#7", "digits#8", "digits#9", "digits#17"]
    assert dataset.name == "digits test"


def test_digits_have_no_val(plain):
    with pytest.raises(DataError, match=r"^digits: no 'val' part; it has train, calibration, test$"):
        open_dataset(None, None, "val", preprocessing=plain)


def test_digits_take_no_path(tmp_path, plain):
    with pytest.raises(DataError, match=r": the digits come with qtool; leave DATA out$"):
        open_dataset(tmp_path, "digits", preprocessing=plain)
