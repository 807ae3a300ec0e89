import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.errors import ConfigError, ModelError
from qtool.models import OWN_ARCHS, checkpoint_sha256, load_model


@pytest.fixture
def save(tmp_path):
    """Saves the weights of a network built by name; returns the file's path."""

    def save(arch, name="net.pth", **kwargs):
        torch.save(load_model(arch, **kwargs).model.state_dict(), tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("arch", [*OWN_ARCHS, "resnet18", "mobilenet_v3_small", "googlenet"])
def test_every_network_is_ready_to_be_evaluated(arch):
    loaded = load_model(arch)
    assert not loaded.model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.model.parameters())
    assert loaded.model(torch.zeros(1, *loaded.input_shape)).ndim == 2
    assert len(loaded.preprocessing.mean) == loaded.input_shape[0]


def test_no_arch_is_the_packaged_network():
    loaded = load_model()
    assert loaded.arch == "digits_resnet"
    assert loaded.weights == "qtool's own digits_resnet weights"
    assert torch.equal(loaded.model.fc.weight, load_model("digits_resnet").model.fc.weight)


def test_packaged_weights_have_ten_classes():
    with pytest.raises(
        ConfigError, match="--num-classes: the packaged weights of digits_resnet have 10 classes"
    ):
        load_model(num_classes=5)


def test_random_weights_follow_the_seed_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b = load_model("resnet20", seed=3), load_model("resnet20", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.weights == "random weights (seed 3)"
    assert torch.equal(a.model.conv1.weight, b.model.conv1.weight)
    assert not torch.equal(a.model.conv1.weight, load_model("resnet20", seed=4).model.conv1.weight)


def test_checkpoint_gives_weights_and_says_so(save):
    path = save("resnet20", seed=5)
    loaded = load_model("resnet20", checkpoint=path)
    assert torch.equal(loaded.model.conv1.weight, load_model("resnet20", seed=5).model.conv1.weight)
    assert loaded.checkpoint_sha256 == checkpoint_sha256(path)
    assert loaded.weights == f"checkpoint net.pth (sha256 {loaded.checkpoint_sha256[:12]})"


@pytest.mark.parametrize("arch", ["resnet20", "squeezenet1_1", "mobilenet_v3_small"])
def test_number_of_classes_is_taken_from_the_checkpoint(save, arch):
    loaded = load_model(arch, checkpoint=save(arch, num_classes=7))
    assert loaded.model(torch.zeros(1, *loaded.input_shape)).shape == (1, 7)


def test_number_of_classes_that_was_asked_for_stands(save):
    with pytest.raises(
        ModelError, match=r"2 of another shape \(linear\.weight \(7, 64\) rather than \(5, 64\)"
    ):
        load_model("resnet20", checkpoint=save("resnet20", num_classes=7), num_classes=5)


@pytest.mark.parametrize(
    ("saved", "asked"),
    [("resnet20", "resnet20_cifar"), ("resnet32", "resnet20"), ("resnet18", None), ("resnet18", "resnet34")],
)
def test_mismatch_names_the_network_that_fits(save, saved, asked):
    path = save(saved, f"{saved}.pth", num_classes=6)
    with pytest.raises(
        ModelError, match=rf"does not fit {asked or 'digits_resnet'}: .* use -a {saved}, "
    ) as error:
        load_model(asked, checkpoint=path)
    assert "\n" not in str(error.value)


def test_mismatch_without_a_fitting_network_says_what_differs(tmp_path):
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"missing \(bn1.*1 of another shape.*; name the network"):
        load_model("resnet20", checkpoint=tmp_path / "net.pth")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "resnet18", "weights": "IMAGENET1K_V1"}, "--weights: .*add --pretrained"),
        (
            {"arch": "resnet18", "pretrained": True, "checkpoint": Path("x.pth")},
            "--pretrained: x.pth holds weights",
        ),
        ({"arch": "resnet20", "pretrained": True}, "--pretrained: resnet20 is not torchvision's"),
        ({"pretrained": True}, "--pretrained: digits_resnet is not torchvision's"),
        ({"arch": "resnet20", "num_classes": 0}, "--num-classes: found 0"),
        ({"arch": "resnet20", "input_shape": (3, 0, 32)}, "--input-shape: found"),
        ({"arch": "resnet20", "input_shape": ()}, "--input-shape: found"),
    ],
)
def test_contradictions_are_config_errors(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        load_model(**kwargs)


def test_another_input_shape_rescales_the_preprocessing():
    loaded = load_model("resnet18", input_shape=(3, 112, 112))
    assert loaded.input_shape == (3, 112, 112)
    assert (loaded.preprocessing.resize, loaded.preprocessing.crop) == (128, 112)


def test_input_shape_that_the_network_refuses_is_a_model_error():
    with pytest.raises(ModelError, match=r"resnet20: does not run on an input of shape \(1, 1, 32, 32\)"):
        load_model("resnet20", input_shape=(1, 32, 32))


def test_package_gives_what_it_announces():
    code = "import qtool.models as m; assert all(getattr(m, name) for name in m.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)
