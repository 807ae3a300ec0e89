"""Which layers are learned together."""

import pytest
import torch
from torch import nn
from torchvision import models

from qtool.algorithms.reconstruction.blocks import find_blocks
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import layers, trace
from qtool.quantizers.plan import WEIGHTED


def _blocks(net, shape=(2, 3, 64, 64), without=(), **settings):
    traced = fold_batch_norms(trace(net.eval(), torch.zeros(shape))).traced
    names = [n for n, node, _ in layers(traced) if node.meta["op"] in WEIGHTED and n not in without]
    blocks = find_blocks(traced.graph, names, **settings)
    assert [name for block in blocks for name in block.layers] == names
    return blocks


def test_residual_blocks_of_a_resnet_are_whole_with_their_shortcut():
    blocks = [block.layers for block in _blocks(models.resnet18(weights=None))]
    assert blocks[0] == ("conv1",)
    assert blocks[1] == ("layer1.0.conv1", "layer1.0.conv2")
    assert set(blocks[3]) == {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"}
    assert blocks[-1] == ("fc",)
    assert len(blocks) == 10


def test_a_residual_block_ends_with_its_addition():
    block = _blocks(models.resnet18(weights=None))[1]
    assert block.exit.meta["op"] == "add"
    assert block.entry not in block.nodes
    assert block.work == 2 * 64 * 16 * 16 * 64 * 9


def test_inverted_residuals_are_whole_with_and_without_addition():
    blocks = [block.layers for block in _blocks(models.mobilenet_v2(weights=None))]
    assert blocks[0] == ("features.0.0",)
    assert blocks[1] == ("features.1.conv.0.0", "features.1.conv.1")
    assert blocks[2] == ("features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2")  # none
    assert blocks[3] == ("features.3.conv.0.0", "features.3.conv.1.0", "features.3.conv.2")  # an addition
    assert len(blocks) == 20


def test_fire_modules_are_whole_with_their_squeeze():
    blocks = [block.layers for block in _blocks(models.squeezenet1_1(weights=None))]
    fire = tuple(f"features.3.{part}" for part in ("squeeze", "expand1x1", "expand3x3"))
    assert blocks[:2] == [("features.0",), fire]
    assert blocks[-1] == ("classifier.1",)
    assert len(blocks) == 10


def test_the_halves_of_a_transformer_layer_are_blocks():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    blocks = [block.layers for block in _blocks(net, (2, 5, 16))]
    assert len(blocks) == 2
    assert blocks[1] == ("linear1", "linear2")


def test_a_block_with_too_many_layers_is_taken_apart():
    blocks = [block.layers for block in _blocks(models.resnet18(weights=None), max_layers=2)]
    assert ("layer1.0.conv1", "layer1.0.conv2") in blocks
    assert ("layer2.0.downsample.0",) in blocks
    assert all(len(names) <= 2 for names in blocks)


def test_single_layers_can_be_asked_for():
    assert all(len(block.layers) == 1 for block in _blocks(models.resnet18(weights=None), unit="layer"))


@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.conv2"])
def test_layers_that_may_not_change_stay_in_their_block_and_are_not_learned(name):
    block = _blocks(models.resnet18(weights=None), without=(name,))[1]
    assert name not in block.layers and len(block.layers) == 1
    assert name in [node.meta.get("layer") for node in block.nodes]


def test_a_network_of_one_layer_is_one_block():
    (block,) = _blocks(nn.Sequential(nn.Linear(4, 2)), (3, 4))
    assert block.layers == ("0",) and block.entry.op == "placeholder"
