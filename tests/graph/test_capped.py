"""ReLU6 with a limit for each channel: in the graph, where it counts as ReLU6."""

import pytest
import torch
from torch import nn

import qtool
from qtool.graph import ops
from qtool.graph.capped import CappedReLU6, limit_of
from qtool.graph.edit import replace_layers
from qtool.graph.fast import fast
from qtool.graph.fingerprint import with_weights
from qtool.graph.fold import fold_batch_norms
from qtool.graph.neighbours import edit_stats, fused_activations
from qtool.graph.trace import trace

LIMIT = torch.tensor([0.5, 1.0, 2.0, 6.0, 9.0, 0.25, 30.0, 3.0]).reshape(8, 1, 1)


@pytest.fixture
def capped(chain_net, tiny_batches):
    folded = fold_batch_norms(trace(chain_net, tiny_batches[0]))
    return replace_layers(folded.traced, {"relu1": CappedReLU6(LIMIT)})


def test_each_channel_ends_at_its_own_limit():
    x = torch.tensor([-1.0, 0.3, 8.0]).expand(8, 3).reshape(1, 8, 1, 3)
    y = CappedReLU6(LIMIT)(x)
    assert torch.equal(y[0, :, 0, 0], torch.zeros(8))
    assert torch.equal(y[0, :, 0, 2], torch.tensor([0.5, 1.0, 2.0, 6.0, 8.0, 0.25, 8.0, 3.0]))
    assert torch.equal(CappedReLU6(torch.full((8, 1, 1), 6.0))(x), nn.functional.relu6(x))


def test_in_place_gives_the_same_in_the_memory_of_its_input():
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 10
    expected = CappedReLU6(LIMIT)(x)
    y = CappedReLU6(LIMIT, inplace=True)(x)
    assert torch.equal(y, expected) and y.data_ptr() == x.data_ptr()


def test_it_counts_as_relu6_and_is_fused_as_one(capped):
    assert ops.module_op(capped.relu1) == "relu6"
    assert fused_activations(capped, {"conv1"}) == {"conv1": ("relu1", "relu6")}
    assert limit_of(nn.ReLU6()) is None and torch.equal(limit_of(capped.relu1), LIMIT)


def test_the_fast_form_keeps_the_limits(capped, tiny_batches):
    quick = fast(capped).traced
    assert isinstance(quick.relu1, CappedReLU6) and quick.relu1.inplace
    torch.testing.assert_close(quick(tiny_batches[0]), capped(tiny_batches[0]))


def test_the_fingerprint_of_weights_sees_the_limits(capped):
    other = replace_layers(capped, {"relu1": CappedReLU6(LIMIT * 2)})
    assert with_weights(capped).weights != with_weights(other).weights
    assert with_weights(capped).names == with_weights(other).names


def test_statistics_in_front_are_those_behind_the_limits(capped, tiny_batches):
    stats = qtool.calibrate(capped, tiny_batches)
    with torch.no_grad():
        behind = capped.relu1(capped.conv1(torch.cat(tiny_batches)))
    edited = edit_stats(capped, stats, {"conv1"}).output("conv1")
    assert edited.max == pytest.approx(float(behind.max()), rel=1e-6)
    assert edited.avg_max == pytest.approx(float(behind.amax((1, 2, 3)).mean()), rel=1e-6)
    assert edited.channel_max == pytest.approx(behind.amax((0, 2, 3)).numpy(), rel=1e-6)
    assert edited.std == stats.output("conv1").std
