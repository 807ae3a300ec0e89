"""A small network of several groups, planned, with images and labels."""

import pytest
import torch
from torch import Tensor, nn

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.trace import trace
from qtool.observers.stats import ModelStats
from qtool.pipeline.steps import specs_for
from qtool.search.sensitivity.points import Plans


class Blocks(nn.Module):
    """conv, residual block, pooling, two linear layers: (N, 3, 8, 8) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()
        self.first, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.pool = nn.AvgPool2d(4)
        self.hidden, self.fc = nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.second(self.relu(self.first(x))))
        x = torch.flatten(self.pool(x), 1)
        return self.fc(self.relu(self.hidden(x)))


@pytest.fixture(scope="session")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Blocks().eval().requires_grad_(False)


@pytest.fixture(scope="session")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(n, 3, 8, 8, generator=generator) for n in (20, 20, 8)]
    return [(x, torch.randint(0, 10, (len(x),), generator=generator)) for x in images]


@pytest.fixture(scope="session")
def stats(net, batches) -> ModelStats:
    return qtool.calibrate(net, [images for images, _ in batches])


@pytest.fixture(scope="session")
def make_plans(net, batches, stats):
    def make(network: nn.Module = net, **settings: object) -> Plans:
        traced = trace(network, batches[0][0])
        measured = stats if network is net else qtool.calibrate(network, [x for x, _ in batches])
        config = QuantizeConfig(**{"mode": "asym_u", "mode_weights": "sym", **settings})
        return Plans(traced, measured, specs_for(traced, config))

    return make
