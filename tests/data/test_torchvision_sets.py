"""The files of torchvision's datasets are read, and missing or damaged ones are named."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets
from torchvision.datasets import cifar

from qtool.data.datasets import open_dataset
from qtool.errors import DataError


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A root with two random images in each file; their checksums are taken as right."""
    monkeypatch.setattr(cifar, "check_integrity", lambda path, _md5=None: Path(path).is_file())
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [4, 2]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return tmp_path


def test_cifar_parts_are_read(cifar10, plain):
    test, train = (
        open_dataset(cifar10, None, split, preprocessing=plain) for split in ("test", "calibration")
    )
    assert [len(test), len(train)] == [2, 10]
    assert test.name == "cifar10 test"
    expected = datasets.CIFAR10(str(cifar10), train=False).data[0] / np.float32(255)
    assert np.array_equal(test[0][0].permute(1, 2, 0).numpy(), expected)
    assert test.path_of(1).endswith("cifar-10-batches-py/test#1")


def test_fashion_mnist_is_read(shared_data, plain):
    dataset = open_dataset(shared_data / "FashionMNIST", None, preprocessing=plain, channels=1)
    assert (len(dataset), dataset.num_classes) == (10000, 10)
    x, label, _ = dataset[0]
    assert (tuple(x.shape), label) == ((1, 28, 28), 9)


def test_labels_beyond_the_classes_are_refused(cifar10, plain):
    pixels = np.zeros((2, 3072), dtype=np.uint8)
    (cifar10 / "cifar-10-batches-py/test_batch").write_bytes(
        pickle.dumps({"data": pixels, "labels": [4, 10]})
    )
    with pytest.raises(DataError, match=r"images and labels do not belong together"):
        open_dataset(cifar10, None, preprocessing=plain)


def test_missing_file_is_refused(cifar10, plain):
    (cifar10 / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(
        DataError, match=r"cifar-10-batches-py: the files of cifar10 are missing or damaged; copy them again$"
    ):
        open_dataset(cifar10, None, preprocessing=plain)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_truncated_file_is_refused(shared_data, tmp_path, plain, name):
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for path in (shared_data / "FashionMNIST/raw").iterdir():
        if path.name == name:
            (raw / name).write_bytes(path.read_bytes()[:1000])
        else:
            shutil.copy(path, raw)
    with pytest.raises(DataError, match=r"^[^\n]*the files of fashion-mnist are missing or damaged[^\n]*$"):
        open_dataset(tmp_path, None, preprocessing=plain)


def test_folder_looked_in_is_named(tmp_path, plain):
    with pytest.raises(DataError, match=r"no cifar100 found; looked for .*/cifar-100-python$"):
        open_dataset(tmp_path, "cifar100", preprocessing=plain)


def test_missing_root_is_named(tmp_path, plain):
    with pytest.raises(DataError, match=r"gone: no such file or folder"):
        open_dataset(tmp_path / "gone", "mnist", preprocessing=plain)


def test_path_is_needed(plain):
    with pytest.raises(DataError, match=r"^mnist: no DATA given; name the folder that holds MNIST/raw$"):
        open_dataset(None, "mnist", preprocessing=plain)


def test_there_is_no_val_part(cifar10, plain):
    with pytest.raises(DataError, match=r": cifar10 has no 'val' part; it has train and test$"):
        open_dataset(cifar10, None, "val", preprocessing=plain)
