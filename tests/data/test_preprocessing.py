"""Preprocessing does what torchvision's presets do, and the user's word counts most."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from qtool.data.kinds import KINDS
from qtool.data.preprocessing import Preprocessing, choose_preprocessing, default_preprocessing
from qtool.errors import ConfigError


@dataclass(frozen=True)
class Hint:
    """What a model may bring along: the same fields, but no Preprocessing."""

    resize: int | None = 232
    crop: int | None = 224
    mean: tuple[float, ...] = (0.1, 0.2, 0.3)
    std: tuple[float, ...] = (1.0, 2.0, 3.0)
    interpolation: str = "bicubic"


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8))


def test_imagenet_default_is_torchvisions_preset(photo):
    expected = ImageClassification(crop_size=224)(photo)
    assert torch.equal(default_preprocessing("folder", "resnet18").transform()(photo), expected)


def test_inception_sees_larger_images():
    chosen = default_preprocessing("folder", "inception_v3")
    assert (chosen.resize, chosen.crop) == (336, 299)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_default_for_rgb_models(kind):
    assert len(default_preprocessing(kind, None).for_channels(3).mean) == 3


def test_hint_wins_over_default():
    assert choose_preprocessing("cifar10", Hint()) == Preprocessing(
        232, 224, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic"
    )


def test_user_wins_over_hint():
    chosen = choose_preprocessing("folder", Hint(), resize=300, crop=0, mean=[0.5], std=[0.25])
    assert chosen == Preprocessing(300, None, (0.5,), (0.25,), "bicubic")


def test_zero_means_no_such_step(photo):
    chosen = choose_preprocessing("folder", None, resize=0, crop=0)
    assert chosen.transform()(photo).shape == (3, 300, 400)


def test_grey_image_becomes_equal_channels():
    grey = Image.fromarray(np.full((2, 2), 255, dtype=np.uint8))
    x = Preprocessing(None, None, (0.0, 0.5, 1.0), (1.0,)).transform()(grey)
    assert x[:, 0, 0].tolist() == [1.0, 0.5, 0.0]


def test_crop_larger_than_the_image_pads(photo):
    assert Preprocessing(None, 500, (0.5,) * 3, (1.0,)).transform()(photo)[:, 0, 0].tolist() == [-0.5] * 3


def test_three_means_do_not_fit_one_channel():
    with pytest.raises(
        ConfigError, match=r"mean: 3 values, but the model takes 1 channel; give --mean one value"
    ):
        default_preprocessing("folder", None).for_channels(1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"std": [0.1, 0.0, 0.1]}, "std: 0.1, 0, 0.1 is not greater than 0"),
        ({"std": [0.1, 0.2]}, "std: 2 values, but mean has 3"),
        ({"mean": [float("nan")]}, "mean: nan is not one finite number per channel"),
        ({"mean": []}, "mean: no value is not one finite number per channel"),
        ({"resize": -1}, "resize: -1 is not a number of pixels greater than 0"),
        ({"crop": -5}, "crop: -5 is not a number of pixels greater than 0"),
    ],
)
def test_value_out_of_range_is_named(changed, message):
    with pytest.raises(ConfigError) as error:
        choose_preprocessing("folder", None, **changed)
    assert str(error.value) == message


def test_unknown_interpolation_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"'bilinaer' is unknown; did you mean 'bilinear'"):
        Preprocessing(None, None, (0.5,), (0.5,), "bilinaer")
