import re
from urllib.error import URLError

import pytest
import torch
import torchvision

from qtool.errors import ConfigError, ModelError
from qtool.models import PreprocessingHint, load_model, zoo
from qtool.models.archs import IMAGENET_MEAN, IMAGENET_STD, torchvision_archs


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """torch's folder of downloaded weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("arch", sorted(torchvision_archs()))
def test_every_network_has_preprocessing_and_weights(arch):
    entry = zoo.choose_weights(arch)
    hint = zoo.preprocessing_of(entry)
    assert hint.resize >= hint.crop > 0
    assert entry.url.endswith(".pth")


@pytest.mark.parametrize(
    ("arch", "hint"),
    [
        ("resnet18", PreprocessingHint(256, 224, IMAGENET_MEAN, IMAGENET_STD)),
        ("inception_v3", PreprocessingHint(342, 299, IMAGENET_MEAN, IMAGENET_STD)),
        ("efficientnet_b2", PreprocessingHint(288, 288, IMAGENET_MEAN, IMAGENET_STD, "bicubic")),
    ],
)
def test_preprocessing_is_that_of_the_first_weights(arch, hint):
    blueprint = zoo.zoo_blueprint(arch)
    assert blueprint.preprocessing == hint
    assert blueprint.input_shape == (3, hint.crop, hint.crop)


def test_weights_bring_their_own_preprocessing():
    blueprint = zoo.pretrained_blueprint("resnet50", "IMAGENET1K_V2")
    assert blueprint.preprocessing.resize == 232
    assert blueprint.weights == "torchvision IMAGENET1K_V2"


def test_default_weights_are_the_first_listed():
    assert zoo.choose_weights("resnet50").name == "IMAGENET1K_V1"
    assert zoo.choose_weights("resnet50", "DEFAULT").name == "IMAGENET1K_V2"


def test_unknown_weights_name_the_known():
    with pytest.raises(ConfigError, match="resnet18 has no weights called 'V7'; choose IMAGENET1K_V1"):
        zoo.choose_weights("resnet18", "V7")


def test_weights_without_classifier_are_refused():
    with pytest.raises(ConfigError, match="IMAGENET1K_FEATURES of vgg16 has no classifier"):
        zoo.choose_weights("vgg16", "IMAGENET1K_FEATURES")


def test_pretrained_fixes_the_number_of_classes(torch_home):
    with pytest.raises(
        ConfigError, match="--num-classes: IMAGENET1K_V1 of resnet18 has 1000 classes, not 10"
    ):
        load_model("resnet18", pretrained=True, num_classes=10)


def test_pretrained_takes_torchvisions_file(torch_home):
    expected = torchvision.models.squeezenet1_1()
    torch.save(expected.state_dict(), torch_home / "squeezenet1_1-b8a52dc0.pth")
    loaded = load_model("squeezenet1_1", pretrained=True)
    assert loaded.weights == "torchvision IMAGENET1K_V1"
    assert torch.equal(loaded.model.classifier[1].weight, expected.classifier[1].weight)


def test_pretrained_real_resnet18(torch_home, shared_data):
    (torch_home / "resnet18-f37072fd.pth").symlink_to(shared_data / "weights" / "resnet18.pth")
    loaded = load_model("resnet18", pretrained=True, weights="IMAGENET1K_V1")
    by_checkpoint = load_model("resnet18", checkpoint=shared_data / "weights" / "resnet18.pth")
    assert torch.equal(loaded.model.fc.weight, by_checkpoint.model.fc.weight)


def test_failed_download_says_where_to_put_the_file(torch_home, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(ModelError, match="cannot be downloaded") as error:
        load_model("resnet18", pretrained=True)
    assert f"put that file at {torch_home / 'resnet18-f37072fd.pth'}, or use --checkpoint" in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_download_says_to_delete_it(torch_home):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"<html>")
    with pytest.raises(ModelError, match=r"resnet18-f37072fd\.pth: not readable .*; delete it") as error:
        load_model("resnet18", pretrained=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arch", "pattern", "published"),
    [
        ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2"),
        ("vit_b_32", r"\.mlp\.(0|3)\.", lambda match: f".mlp.linear_{1 + int(match[1]) // 3}."),
    ],
)
def test_keys_of_published_files_are_renamed(arch, pattern, published):
    with torch.device("meta"):
        own = torchvision.models.get_model(arch).state_dict()
    saved = {re.sub(pattern, published, key): tensor for key, tensor in own.items()}
    assert saved.keys() != own.keys()
    renamed = zoo.rename_keys(arch, saved)
    assert renamed.keys() == own.keys()
    assert all(renamed[key] is tensor for key, tensor in own.items())


@pytest.mark.parametrize("arch", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("aux_logits", [True, False])
def test_auxiliary_classifiers_of_a_checkpoint_do_not_matter(tmp_path, arch, aux_logits):
    model = torchvision.models.get_model(
        arch, aux_logits=aux_logits, init_weights=False, transform_input=True
    )
    torch.save(model.state_dict(), tmp_path / "net.pth")
    loaded = load_model(arch, checkpoint=tmp_path / "net.pth")
    x = torch.rand(1, *loaded.input_shape)
    with torch.no_grad():
        assert torch.equal(loaded.model(x), model.eval()(x))


def test_checkpoint_that_is_a_plain_dict_fits_mnasnet(tmp_path):
    torch.save(dict(torchvision.models.mnasnet0_5().state_dict()), tmp_path / "net.pth")
    assert load_model("mnasnet0_5", checkpoint=tmp_path / "net.pth").checkpoint_sha256


def test_vision_transformer_is_built_for_its_image_size():
    loaded = load_model("vit_b_32", input_shape=(3, 64, 64))
    assert loaded.model.encoder.pos_embedding.shape[1] == 1 + (64 // 32) ** 2
    with pytest.raises(ModelError, match=r"vit_b_32: no input of shape \(3, 65, 65\)"):
        load_model("vit_b_32", input_shape=(3, 65, 65))
