import numpy as np
import pytest
import torch

from qtool.models import load_model
from qtool.models.cifar import BasicBlock, DistillerResNet, EltwiseAdd, blocks_per_stage


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, [0, 1, 6, 7]].any()


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5), (44, 7), (56, 9)])
def test_depth_is_six_layers_a_block_and_two(depth, blocks):
    assert blocks_per_stage(depth) == blocks


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=f"found {depth}"):
        blocks_per_stage(depth)


def test_distillers_layer_names():
    names = dict(DistillerResNet(20).named_modules()).keys()
    block = {"conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "residual_eltwiseadd"}
    assert {f"layer2.0.{name}" for name in block | {"downsample.0", "downsample.1"}} <= names
    assert {"relu", "avgpool", "fc"} <= names
    assert "layer2.1.downsample" not in names


def test_add_is_announced_to_the_tracer():
    assert EltwiseAdd.qtool_op == "add"
    assert EltwiseAdd()(torch.tensor(1), torch.tensor(2)) == 3


@pytest.mark.parametrize(
    ("arch", "top1"),
    [
        ("resnet20", 91.64),
        ("resnet20_distiller", 92.13),
        pytest.param("resnet32", 92.82, marks=pytest.mark.slow),
        pytest.param("resnet44", 93.41, marks=pytest.mark.slow),
        pytest.param("resnet56", 92.72, marks=pytest.mark.slow),
    ],
)
def test_published_weights_are_as_accurate_as_published(shared_data, arch, top1):
    with np.load(shared_data / "cifar10" / "test-1017.npz") as test:
        x = torch.from_numpy(test["images"]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(test["labels"])
    loaded = load_model(arch, checkpoint=shared_data / "cifar10" / f"{arch}.pth")
    mean, std = torch.tensor([loaded.preprocessing.mean, loaded.preprocessing.std])[:, :, None, None]
    with torch.no_grad():
        correct = loaded.model((x - mean) / std).argmax(1) == labels
    assert 100 * correct.double().mean() == pytest.approx(top1, abs=0.1)  # one image in 1017 is 0.1


def test_distillers_own_checkpoint_file_loads(shared_data):
    path = shared_data / "distiller" / "checkpoint_trained_dense.pth.tar"
    loaded = load_model("resnet20_cifar", checkpoint=path)
    plain = load_model("resnet20_cifar", checkpoint=shared_data / "cifar10" / "resnet20_distiller.pth")
    assert torch.equal(loaded.model.fc.weight, plain.model.fc.weight)
