import subprocess
import sys

import pytest
import torchvision

from qtool.errors import ConfigError, ModelError
from qtool.models import archs


def test_every_classification_model_of_torchvision_is_listed():
    assert archs.torchvision_archs() == set(torchvision.models.list_models(module=torchvision.models))


def test_own_names_hide_none_of_torchvisions():
    assert not (archs.OWN_ARCHS.keys() | archs.ALIASES.keys()) & archs.torchvision_archs()


def test_listing_archs_does_not_import_torch():
    code = "import sys; from qtool.models import list_archs; list_archs(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("alias", "arch"), archs.ALIASES.items())
def test_alias_becomes_the_canonical_name(alias, arch):
    assert archs.canonical_arch(alias) == arch
    assert archs.canonical_arch(arch) == arch


@pytest.mark.parametrize(("typo", "meant"), [("resnet51", "resnet50"), ("ResNet50", "resnet50")])
def test_unknown_arch_names_the_nearest(typo, meant):
    with pytest.raises(ModelError, match=f"--arch: no network is called '{typo}'; did you mean .*'{meant}'"):
        archs.canonical_arch(typo)


def test_another_size_keeps_the_proportion_of_resize_and_crop():
    hint = archs.PreprocessingHint(256, 224, archs.IMAGENET_MEAN, archs.IMAGENET_STD)
    smaller = archs.fit_to_shape(hint, (3, 112, 112))
    assert (smaller.resize, smaller.crop, smaller.mean) == (128, 112, hint.mean)


def test_crops_are_square():
    hint = archs.PreprocessingHint(256, 224, archs.IMAGENET_MEAN, archs.IMAGENET_STD)
    with pytest.raises(ConfigError, match="--input-shape"):
        archs.fit_to_shape(hint, (3, 112, 96))


def test_what_crops_nothing_takes_any_shape():
    assert archs.fit_to_shape(archs.CIFAR_PREPROCESSING, (3, 40, 30)) == archs.CIFAR_PREPROCESSING
