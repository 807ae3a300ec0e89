"""Bias correction from batch norms alone, against integrals and against images."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

from qtool.algorithms.analytic_bias import (
    NOT_KNOWN,
    batch_norm_outputs,
    clipped_normal_mean,
    correct_bias_without_data,
    known_means,
)
from qtool.algorithms.bias_correction import correct_bias
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import layers, trace


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-3.0, 0.5), (5.0, 2.0), (30.0, 1.0), (2.0, 4.0)])
def test_the_mean_behind_a_clip_is_that_of_the_integral(mean, std, limits):
    low, high = limits
    normal = stats.norm(mean, std)
    inside, _ = integrate.quad(lambda x: x * normal.pdf(x), low, min(high, mean + 12 * std), points=[mean])
    expected = inside + low * normal.cdf(low) + (high * normal.sf(high) if math.isfinite(high) else 0.0)
    found = clipped_normal_mean(torch.tensor([mean]), torch.tensor([std]), *limits)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_a_constant_is_clipped():
    found = clipped_normal_mean(torch.tensor([-1.0, 3.0, 9.0]), torch.zeros(3), 0.0, 6.0)
    assert found.tolist() == [0, 3, 6]


class Net(nn.Module):
    """Everything that keeps means known, and a pooling that does not."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.conv4 = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(16 * 4, 5)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        a = F.relu(self.bn1(self.conv1(x)))
        b = self.bn2(self.conv2(a))
        both = torch.cat([a, a + b], 1)
        return self.fc(self.pool(both).flatten(1)), self.conv3(both), self.conv4(F.max_pool2d(a, 2))


@pytest.fixture
def measured_net():
    """Net with batch norms that hold the statistics of normal images, and many such images."""
    generator = torch.Generator().manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    net.bn1.weight.data, net.bn2.weight.data = (torch.rand(8, generator=generator) + 0.5 for _ in range(2))
    x = torch.randn(500, 4, 4, 4, generator=generator)
    for bn in (net.bn1, net.bn2):
        bn.momentum = 1.0
    net.train()(x)
    return net.eval().requires_grad_(False), list(x.split(100))


def test_means_are_known_as_far_as_they_follow(measured_net):
    net, batches = measured_net
    traced = trace(net, batches[0][:2])
    reference = fold_batch_norms(traced).traced
    given = batch_norm_outputs(traced, reference)
    assert sorted(given) == ["conv1", "conv2"]
    assert torch.equal(given["conv2"].std, net.bn2.weight.double())
    known = {name: known_means(reference, given)[node] for name, node, _ in layers(reference)}
    x = torch.cat(batches)
    a = F.relu(net.bn1(net.conv1(x)))
    both = torch.cat([a, a + net.bn2(net.conv2(a))], 1)
    assert torch.allclose(known["relu"].mean, a.mean((0, 2, 3)).double(), atol=0.03)
    for name in ("cat", "pool"):
        assert torch.allclose(known[name].mean, both.mean((0, 2, 3)).double(), atol=0.05)
    assert known["max_pool2d"] is None and known["conv3"] is None


@pytest.mark.parametrize("bits", [0, 8], ids=["weights only", "W3A8"])
def test_the_correction_is_about_that_of_images(bits, measured_net, planned):
    net, batches = measured_net
    case = planned(net, batches, bits_weights=3, bits_activations=bits)
    traced = trace(net, batches[0][:2])
    folded, plan, report = correct_bias_without_data(*case.given[:3], traced=traced, layers=case.names)
    expected, _, _ = correct_bias(*case.given, layers=case.names)
    assert [change.name for change in report.changed] == ["conv2", "fc", "conv3"]
    assert report.left == {"conv1": NOT_KNOWN, "conv4": NOT_KNOWN}
    for name in ("conv2", "fc", "conv3"):
        was, found, wanted = (
            network.get_submodule(name).bias.detach()
            for network in (case.reference, folded.traced, expected.traced)
        )
        assert (found - wanted).norm() < 0.15 * (was - wanted).norm(), name
        assert plan.layers[name] is not case.plan.layers[name]


def test_batch_norms_say_nothing_of_weights_that_were_changed_since(measured_net, planned):
    net, batches = measured_net
    case = planned(net, batches, bits_weights=3)
    traced = trace(net, batches[0][:2])
    conv1 = case.reference.get_submodule("conv1")
    doubled = with_parameters(conv1, weight=2 * conv1.weight, bias=2 * conv1.bias)
    reference = replace_layers(case.reference, {"conv1": doubled})
    assert sorted(batch_norm_outputs(traced, reference)) == ["conv2"]
    _, plan, report = correct_bias_without_data(
        reference, case.folded, case.plan, traced=traced, layers=["conv2"]
    )
    assert plan.layers["conv2"] is case.plan.layers["conv2"]
    assert report.left == {"conv2": NOT_KNOWN}
