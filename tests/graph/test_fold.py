import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from qtool.graph.fold import (
    fold_batch_norms,
    fold_weights,
    move_stats,
    output_channels_first,
    restore_layout,
)
from qtool.graph.trace import layers, trace
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats

# Folding multiplies in another order; float32 keeps 24 bits.
RELATIVE = 1e-5


def close(a, b) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= RELATIVE * float(b.abs().max())


def test_fold_weights_by_hand():
    weight, bias = fold_weights(
        torch.tensor([[1.0, -2.0], [3.0, 4.0]]),
        torch.tensor([1.0, 2.0]),
        mean=torch.tensor([0.0, 5.0]),
        var=torch.tensor([3.0, 15.0]),
        eps=1.0,
        gamma=torch.tensor([2.0, -1.0]),
        beta=torch.tensor([10.0, 20.0]),
    )
    assert weight.tolist() == [[1.0, -2.0], [-0.75, -1.0]]
    assert bias.tolist() == [11.0, 20.75]


PAIRS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv2d in groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "non-affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 7, 7)),
    "frozen": (nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6), (2, 4, 7, 7)),
    "frozen, convolution without bias": (
        nn.Conv2d(4, 6, 1, bias=False), FrozenBatchNorm2d(6), (2, 4, 1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_folded_pair_gives_the_same_from_one_layer(pair, warm):
    layer, norm, shape = pair
    net, x = warm(nn.Sequential(layer, norm)), torch.randn(shape)
    folded = fold_batch_norms(trace(net, x))
    assert folded.pairs == {"1": "0"}
    assert [name for name, _, _ in layers(folded.traced)] == ["0"]
    assert close(folded.traced(x), net(x))
    assert not close(layer(x), net(x)), "this batch norm does nothing, so the test shows nothing"


def test_folding_leaves_the_given_graph_and_network_alone(warm):
    net = warm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5)
    weight, traced = net[0].weight.clone(), trace(net, x)
    expected = traced(x)
    fold_batch_norms(traced)
    assert torch.equal(traced(x), expected)
    assert torch.equal(net[0].weight, weight)
    assert [name for name, _, _ in layers(traced)] == ["0", "1"]


NOT_FOLDED = {
    "no running statistics": (
        lambda self, x: self.bn(self.conv(x)),
        {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4, track_running_stats=False)},
        (2, 3, 5, 5),
    ),
    "another reader of the convolution": (
        lambda self, x: self.bn(y := self.conv(x)) + y,
        {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)},
        (2, 3, 5, 5),
    ),
    "the convolution is an output": (
        lambda self, x: (self.bn(y := self.conv(x)), y),
        {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)},
        (2, 3, 5, 5),
    ),
    "an activation in between": (
        lambda self, x: self.bn(torch.relu(self.conv(x))),
        {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)},
        (2, 3, 5, 5),
    ),
    "the input": (lambda self, x: self.bn(x), {"bn": nn.BatchNorm2d(3)}, (2, 3, 5, 5)),
    "channels on another axis": (
        lambda self, x: self.bn(self.fc(x)),
        {"fc": nn.Linear(4, 6), "bn": nn.BatchNorm1d(5)},
        (2, 5, 4),
    ),
    "as many channels as outputs, on another axis": (
        lambda self, x: self.bn(self.fc(x)),
        {"fc": nn.Linear(4, 5), "bn": nn.BatchNorm1d(5)},
        (2, 5, 4),
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_what_cannot_be_folded_stays(case, traced_lambda):
    forward, modules, shape = case
    traced = traced_lambda(forward, shape, **modules)
    folded = fold_batch_norms(traced)
    assert folded.pairs == {}
    assert "bn" in [name for name, _, _ in layers(folded.traced)]


def test_pairs_are_found_by_edges_and_not_by_order(traced_lambda):
    """D3: Distiller's tracer order would fold bn1 into conv2 here."""

    def forward(self, x):
        a, b = self.conv1(x), self.conv2(x)
        return self.bn1(a) - self.bn2(b)

    modules = {f"conv{i}": nn.Conv2d(3, 4, 1) for i in (1, 2)} | {f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2)}
    traced, x = traced_lambda(forward, (2, 3, 5, 5), **modules), torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(traced)
    assert folded.pairs == {"bn1": "conv1", "bn2": "conv2"}
    assert close(folded.traced(x), traced(x))


def test_a_shared_convolution_takes_in_a_batch_norm_of_each_call(traced_lambda):
    def forward(self, x):
        return self.bn2(self.conv(self.bn1(self.conv(x)))) + self.conv(x)

    modules = {"conv": nn.Conv2d(3, 3, 1), "bn1": nn.BatchNorm2d(3), "bn2": nn.BatchNorm2d(3)}
    traced, x = traced_lambda(forward, (2, 3, 5, 5), **modules), torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(traced)
    assert folded.pairs == {"bn1": "conv1", "bn2": "conv2"}
    assert close(folded.traced(x), traced(x))


def test_a_shared_batch_norm_is_folded_into_each_producer(traced_lambda):
    def forward(self, x):
        return self.bn(self.a(x)) * self.bn(self.b(x))

    modules = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 3, padding=1), "bn": nn.BatchNorm2d(4)}
    traced, x = traced_lambda(forward, (2, 3, 5, 5), **modules), torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(traced)
    assert folded.pairs == {"bn1": "a", "bn2": "b"}
    assert close(folded.traced(x), traced(x))


def test_two_batch_norms_in_a_row_are_both_folded(warm):
    net = warm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 5, 5)
    folded = fold_batch_norms(trace(net, x))
    assert folded.pairs == {"1": "0", "2": "0"}
    assert close(folded.traced(x), net(x))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_output_channels_of_a_transposed_convolution_come_group_by_group(groups):
    layer = nn.ConvTranspose2d(6, 12, (2, 3), groups=groups, bias=False)
    rows = output_channels_first(layer)
    assert rows.shape == (12, 6 // groups, 2, 3)
    assert torch.equal(restore_layout(rows, layer), layer.weight)
    for channel in (0, 5, 11):
        alone = torch.zeros_like(rows)
        alone[channel] = rows[channel]
        layer_of_one = nn.ConvTranspose2d(6, 12, (2, 3), groups=groups, bias=False)
        layer_of_one.weight.data = restore_layout(alone, layer)
        out = layer_of_one(torch.ones(1, 6, 3, 3))
        assert out.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [channel]


def record(number: float) -> ActivationStats:
    return ActivationStats(-number, number)


def test_a_layers_output_becomes_its_batch_norms():
    stats = ModelStats(
        {
            "conv": LayerStats({0: record(1)}, record(2)),
            "bn": LayerStats({0: record(2)}, record(3)),
            "fc": LayerStats({0: record(3)}, record(4)),
        },
        source="there.yaml",
    )
    moved = move_stats(stats, {"bn": "conv"})
    assert dict(moved.layers) == {
        "conv": LayerStats({0: record(1)}, record(3)),
        "fc": LayerStats({0: record(3)}, record(4)),
    }
    assert moved.source == "there.yaml"
    assert stats.output("conv") == record(2)


def test_statistics_of_a_folded_network_stay():
    stats = ModelStats({"conv": LayerStats({0: record(1)}, record(3))})
    assert dict(move_stats(stats, {"bn": "conv"}).layers) == dict(stats.layers)
