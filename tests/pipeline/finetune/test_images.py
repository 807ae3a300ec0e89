"""Which images are trained on."""

import numpy as np
import pytest

from qtool.config import load_config
from qtool.errors import ConfigError, DataError
from qtool.pipeline.finetune.images import open_training, with_training_calibration
from qtool.pipeline.inputs import open_calibration, open_evaluation, open_subject


@pytest.fixture
def digits(tmp_path):
    """A file of made-up grey images: digits("name.npz", 40)."""

    def make(name, count, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / name, images=pixels, labels=np.arange(count) % 10)
        return tmp_path / name

    return make


def _open(**flags):
    config = load_config(workers=0, **flags)
    subject = open_subject(config)
    return config, open_training(config, subject, open_evaluation(config, subject))


def test_the_training_part_of_data_is_trained_on():
    _, images = _open(held_out=0.25)
    assert images.learn.dataset.name == "digits train"
    assert (len(images.learn.indices), len(images.held_out.indices)) == (675, 225)
    assert not set(images.learn.indices) & set(images.held_out.indices)


def test_nothing_may_be_held_out():
    _, images = _open(held_out=0.0)
    assert images.held_out is None and len(images.learn.indices) == 900
    assert "held out" not in images.words


def test_few_images_cannot_be_divided(digits):
    with pytest.raises(DataError, match="too few to hold some of them out"):
        _open(train_data=digits("few.npz", 3), held_out=0.1)


def test_data_without_training_images_needs_others(digits):
    flags = {"arch": "digits_resnet", "path": digits("test.npz", 30)}
    with pytest.raises(ConfigError, match=r"--train-data: .*test\.npz has no training images of its own"):
        _open(**flags)
    _, images = _open(**flags, train_data=digits("train.npz", 40, seed=1))
    assert len(images.learn.indices) == 36


def test_evaluation_images_are_not_trained_on(digits):
    path = digits("test.npz", 30)
    with pytest.raises(ConfigError, match="30 of the 30 evaluation images are also training images"):
        _open(arch="digits_resnet", path=path, train_data=path)


def test_training_images_calibrate_unless_others_are_named(digits):
    train, other = digits("train.npz", 40, seed=1), digits("other.npz", 20, seed=2)
    for flags, name in (({}, "train.npz"), ({"calib_data": other}, "other.npz")):
        config = load_config(arch="digits_resnet", path=digits("test.npz", 30), train_data=train, **flags)
        config = with_training_calibration(config)
        subject = open_subject(config)
        assert open_calibration(config, subject, open_evaluation(config, subject)).dataset.name == name


def test_colour_images_are_mirrored_and_moved_and_grey_ones_stay(digits):
    _, images = _open()
    assert not images.augmentation.flip and not images.augmentation.crop
    _, images = _open(augment="flip-crop")
    assert images.augmentation.flip and images.augmentation.crop
    assert images.augmentation.black == pytest.approx((-0.3055 / 0.3766,), rel=1e-5)
    train = digits("train.npz", 40, seed=1)
    config = load_config(
        arch="resnet20", path=digits("test.npz", 30), train_data=train, input_shape=(3, 32, 32)
    )
    subject = open_subject(config)
    found = open_training(config, subject, open_evaluation(config, subject)).augmentation
    assert found.flip and found.crop and len(found.black) == 3


def test_batches_of_the_steps_that_are_left_are_those_of_the_whole():
    config, images = _open(batch_size=32, augment="flip-crop")
    whole = list(images.batches(config, 0, 30))
    rest = list(images.batches(config, 25, 30))
    assert [step for step, _ in rest] == [25, 26, 27, 28, 29]
    for (_, a), (_, b) in zip(whole[25:], rest, strict=True):
        assert a.indices.equal(b.indices) and a.images.equal(b.images) and len(a.images) == 32


def test_the_digest_tells_images_apart(digits):
    digests = {
        _open(**flags)[1].digest()
        for flags in ({}, {"held_out": 0.2}, {"seed": 1}, {"train_data": digits("a.npz", 40)})
    }
    assert len(digests) == 4
    assert _open()[1].digest() in digests
