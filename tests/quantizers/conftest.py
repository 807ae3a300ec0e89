"""A network with every operation that computes on integers, its batches and its statistics."""

import pytest
import torch
from torch import Tensor, nn

import qtool
from qtool.observers.stats import ModelStats


class VariedNet(nn.Module):
    """(N, 3, 8, 8) -> (N, 10) through everything that section 10 of Distiller's behaviour describes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU6()
        self.relu3 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.gate = nn.Conv2d(14, 14, 1)
        self.sigmoid = nn.Sigmoid()
        self.avgpool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(14 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu1(self.bn1(self.conv1(x)))
        b = self.relu2(self.bn2(self.depthwise(a)))
        s = self.relu3(a + b)
        u = self.up(self.maxpool(s))
        c = torch.cat([s, u], 1)
        p = c * self.sigmoid(self.gate(c))
        return self.fc(torch.flatten(self.dropout(self.avgpool(p)), 1))


@pytest.fixture(scope="session")
def varied_net() -> VariedNet:
    """Seeded, in eval mode; channels differ in size, batch norms shift, ReLU6 clips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VariedNet().eval()
        for bn in (net.bn1, net.bn2):
            nn.init.uniform_(bn.weight, 0.5, 3.0)
            nn.init.normal_(bn.bias)
            nn.init.normal_(bn.running_mean, std=0.3)
            nn.init.uniform_(bn.running_var, 0.2, 2.0)
        net.up.weight.data *= torch.linspace(0.2, 3.0, 3)[None, :, None, None]
        net.gate.weight.data *= torch.linspace(0.2, 3.0, 14)[:, None, None, None]
        net.gate.weight.data *= 3
    return net.requires_grad_(False)


@pytest.fixture(scope="session")
def varied_batch() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.3


@pytest.fixture(scope="session")
def varied_stats(varied_net: nn.Module) -> ModelStats:
    generator = torch.Generator().manual_seed(2)
    return qtool.calibrate(varied_net, [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)])
