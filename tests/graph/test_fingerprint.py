"""Statistics of another network are refused, with what differs (E9)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import qtool
from qtool.errors import StatsError
from qtool.graph.fingerprint import check_network, fingerprint, with_weights
from qtool.graph.trace import trace


def net(width=4, act=nn.ReLU, **more):
    layers = {"conv": nn.Conv2d(3, width, 3), "act": act(), "fc": nn.Conv2d(width, 5, 1)}
    model = nn.Sequential()
    for name, module in {**layers, **more}.items():
        model.add_module(name, module)
    return model.eval()


def batch(size=8, count=4):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stats():
    return qtool.calibrate(net(), [batch()])


def test_the_same_network_fits_whatever_its_weights_and_its_batches(stats):
    check_network(stats, trace(net(), batch()))
    check_network(stats, trace(net(), batch(count=1)))
    assert fingerprint(trace(net(), batch(count=1))) == fingerprint(trace(net(), batch(count=5)))
    assert qtool.quantize(net(), stats)(batch()).shape == (4, 5, 6, 6)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (net(width=7), "the output of layer 'conv' has shape 4x6x6, here 7x6x6"),
        (net(last=nn.Tanh()), "1 layers of this one are not in it, such as 'last'"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3)),
            "3 of its layers are not in this one, such as 'conv' and 1 layers",
        ),
    ],
)
def test_e9_another_network_is_refused_with_what_differs(stats, other, difference):
    with pytest.raises(StatsError) as caught:
        qtool.quantize(other, stats)
    assert str(caught.value).startswith(f"this calibration: measured on another network: {difference}")
    assert str(caught.value).endswith("; measure this network with 'qtool calibrate'")


def test_images_of_another_size_are_another_matter(stats):
    check_network(stats, trace(net(), batch(size=16)))


def test_statistics_without_a_fingerprint_pass(stats):
    check_network(replace(stats, fingerprint=None), trace(net(width=7), batch()))


def test_fingerprints_tell_weights_apart_and_ignore_counters(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    before = with_weights(traced)
    assert before == replace(fingerprint(traced), weights=before.weights)
    traced.bn1.num_batches_tracked += 1
    assert with_weights(traced) == before
    traced.fc.weight.data[0, 0] += 1
    assert with_weights(traced).weights != before.weights
