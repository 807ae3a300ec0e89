import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.models import load_model
from qtool.models.archs import DIGITS_PREPROCESSING

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "qtool" / "data" / "digits.npz"


@pytest.fixture(scope="module")
def digits():
    """Images (1797, 1, 8, 8) in [0, 1], labels, and each one's index modulo 10, which decides its split."""
    with np.load(DIGITS) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    return images[:, None] / 16, labels, torch.arange(len(labels)) % 10


def test_packaged_weights_read_digits(digits):
    images, labels, index = digits
    (mean,), (std,) = DIGITS_PREPROCESSING.mean, DIGITS_PREPROCESSING.std
    with torch.no_grad():
        correct = load_model().model((images - mean) / std).argmax(1) == labels
    assert correct[index >= 7].double().mean() > 0.98


def test_preprocessing_is_that_of_the_training_images(digits):
    images, _, index = digits
    train = images[index < 5]
    assert DIGITS_PREPROCESSING.mean == pytest.approx((train.mean().item(),), abs=1e-4)
    assert DIGITS_PREPROCESSING.std == pytest.approx((train.std().item(),), abs=1e-4)


def test_network_has_one_of_everything():
    model = load_model().model
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"Conv2d", "BatchNorm2d", "ReLU", "AdaptiveAvgPool2d", "Linear"} <= kinds
    assert model.layer1.downsample is None and model.layer2.downsample is not None
    assert model.depthwise[0].groups == model.depthwise[0].in_channels
    assert 10_000 < sum(p.numel() for p in model.parameters()) < 30_000


def test_digits_are_scikit_learns(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is one of the development extras")
    script = REPOSITORY / "scripts" / "make_digits.py"
    subprocess.run([sys.executable, script, tmp_path / "digits.npz"], check=True, capture_output=True)
    with np.load(tmp_path / "digits.npz") as made, np.load(DIGITS) as packaged:
        assert all(np.array_equal(made[key], packaged[key]) for key in ("images", "labels"))
        assert packaged["images"].dtype == np.uint8 and packaged["images"].max() == 16
        assert packaged["labels"].dtype == np.int64


@pytest.mark.slow
def test_training_twice_writes_the_same_bytes(tmp_path):
    script = REPOSITORY / "scripts" / "train_digits.py"
    for name in ("a.pth", "b.pth"):
        subprocess.run([sys.executable, script, tmp_path / name], check=True, capture_output=True)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
