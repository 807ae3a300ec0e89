"""Where a network begins and ends, and what its layers read."""

import torch
from torch import nn

from qtool.graph.ends import feeding, first_and_last
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import layers, trace


class Branched(nn.Module):
    """Two inputs, a residual in between, two heads; the pooled head reads a shape of the other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 1)
        self.middle, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.conv_head, self.linear_head = nn.Conv2d(8, 2, 1), nn.Linear(16, 2)

    def forward(self, a, b):
        y = self.left(a) + self.right(b)
        z = torch.relu(self.norm(self.middle(y)))
        maps = self.conv_head(torch.cat([y, self.pool(z).repeat(1, 1, 2, 2)], 1))
        pooled = nn.functional.adaptive_avg_pool2d(z, 2)
        return maps, self.linear_head(pooled.reshape(maps.shape[0], -1))


def _branched():
    example = (torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4))
    traced = fold_batch_norms(trace(Branched().eval(), example)).traced
    return traced, {name: node for name, node, _ in layers(traced)}


def test_every_input_has_a_first_and_every_head_a_last_layer():
    traced, _ = _branched()
    assert first_and_last(traced, {"conv", "linear"}) == (["left", "right"], ["conv_head", "linear_head"])


def test_a_layer_alone_is_both_ends_and_other_operations_do_not_count():
    traced, _ = _branched()
    assert first_and_last(traced, {"linear"}) == (["linear_head"], ["linear_head"])
    assert first_and_last(traced, {"conv_transpose"}) == ([], [])


def test_what_feeds_a_layer_is_seen_through_views_and_through_what_only_selects():
    _, nodes = _branched()
    assert feeding(nodes["left"]) == []
    assert feeding(nodes["linear_head"]) == ["adaptive_avg_pool2d"]
    assert feeding(nodes["conv_head"]) == ["cat", "add", "pool", "relu", "middle"]
