"""A layer whose channels differ a thousandfold, quantized per tensor, is the worst by every metric."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qtool.search.sensitivity.estimate import estimate
from qtool.search.sensitivity.exact import harm_alone, harm_without
from qtool.search.sensitivity.scores import METRICS

HARMFUL = "hidden"


class Uneven(nn.Module):
    """The network with the weights of one layer scaled by channel, and its outputs scaled back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name, child in copy.deepcopy(net).named_children():
            self.add_module(name, child)
        shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
        factors = torch.logspace(-1.5, 1.5, 32)[shuffled]
        self.hidden.weight *= factors.reshape(-1, 1)
        self.hidden.bias *= factors
        self.register_buffer("back", 1 / factors)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.second(self.relu(self.first(x))))
        x = torch.flatten(self.pool(x), 1)
        return self.fc(self.relu(self.hidden(x) * self.back))


@pytest.fixture(scope="module")
def harmed(net):
    network = Uneven(net).eval().requires_grad_(False)
    network.fc.weight *= 50  # decided enough for its predictions to serve as labels
    return network


@pytest.fixture(scope="module")
def labelled(harmed, batches):
    return [(images, harmed(images).argmax(1)) for images, _ in batches]


@pytest.fixture(scope="module")
def plans(harmed, make_plans):
    found = make_plans(harmed, bits_activations=0)  # outputs that uneven are harmed too, and by another layer
    weight = found.folded.traced.get_submodule(HARMFUL).weight
    ranges = weight.abs().amax(1)
    assert ranges.max() / ranges.min() > 900
    return found


@pytest.fixture(scope="module")
def points(plans):
    return [plans.alone(group) for group in plans.groups]


@pytest.mark.parametrize("metric", METRICS)
def test_it_does_the_most_damage(plans, points, labelled, metric):
    scores = harm_alone(plans, points, labelled)
    worst = max(range(len(points)), key=lambda number: scores[number].key(metric))
    assert HARMFUL in points[worst].group.layers and scores[worst].harm(metric) > 0


@pytest.mark.parametrize("metric", METRICS)
def test_leaving_it_in_float_gains_the_most(plans, labelled, metric):
    whole, scores = harm_without(plans, plans.groups, labelled)
    best = min(range(len(scores)), key=lambda number: scores[number].key(metric))
    assert HARMFUL in plans.groups[best].layers and scores[best].harm(metric) < whole.harm(metric)


@pytest.mark.parametrize("metric", ["sqnr", "kl"])
def test_it_does_the_most_damage_by_estimates(plans, points, labelled, metric):
    scores = estimate(plans, points, [images for images, _ in labelled], metric)
    worst = max(range(len(points)), key=lambda number: scores[number].key(metric))
    assert HARMFUL in points[worst].group.layers
