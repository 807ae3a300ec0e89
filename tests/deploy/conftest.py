"""A network with everything that has a rule for int8 kernels, its batches and its statistics."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.observers.stats import ModelStats
from qtool.quantizers.prepare import QuantizedModel


class KernelNet(nn.Module):
    """(N, 3, 8, 8) -> (N, 10); layers with and without bias, 112 groups, every rule of the conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 112, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(112, 112, 3, padding=1, groups=112)
        self.relu6 = nn.ReLU6()
        self.few_groups = nn.Conv2d(112, 112, 3, padding=1, groups=8)
        self.maxpool = nn.MaxPool2d(2)
        self.own_relu = nn.ReLU()
        self.own_relu6 = nn.ReLU6()
        self.squeeze = nn.Conv2d(224, 16, 1, bias=False)
        self.hardswish = nn.Hardswish()
        self.leaky = nn.LeakyReLU(0.1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.sigmoid = nn.Sigmoid()
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc1 = nn.Linear(16, 24, bias=False)
        self.fc2 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x))
        b = self.relu6(self.depthwise(a))
        s = F.relu(a + self.few_groups(b))
        p = self.maxpool(s)
        c = torch.cat([self.own_relu(p), self.own_relu6(p)], 1)
        h = self.hardswish(self.squeeze(c))
        h = h + self.leaky(h)
        g = self.sigmoid(self.gate(self.avgpool(h)))
        m = h * g
        u = self.up(m).mean()
        return self.fc2(F.relu(self.fc1(m.mean([2, 3])))) + u


@pytest.fixture(scope="session")
def kernel_net() -> KernelNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = KernelNet().eval()
        for layer in (net.conv1, net.depthwise, net.few_groups, net.squeeze, net.gate, net.fc1):
            channels = layer.weight.shape[0]
            layer.weight.data *= torch.linspace(1.0, 4.0, channels).reshape(
                -1, *[1] * (layer.weight.dim() - 1)
            )
    return net.requires_grad_(False)


@pytest.fixture(scope="session")
def kernel_batch() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.3


@pytest.fixture(scope="session")
def kernel_stats(kernel_net: nn.Module) -> ModelStats:
    generator = torch.Generator().manual_seed(2)
    return qtool.calibrate(kernel_net, [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)])


@pytest.fixture
def quantized(kernel_net: nn.Module, kernel_stats: ModelStats) -> Callable[..., QuantizedModel]:
    """Quantize kernel_net with some settings."""
    return lambda **settings: qtool.quantize(kernel_net, kernel_stats, qtool.QuantizeConfig(**settings))


def _batches(images: Tensor, labels: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture(scope="session")
def digits_batches() -> list[tuple[Tensor, Tensor]]:
    """The evaluation images of the embedded data set, with their labels."""
    from qtool.config import Config, DataConfig
    from qtool.pipeline.inputs import open_evaluation, open_subject

    config = Config(data=DataConfig(workers=0))
    loader = open_evaluation(config, open_subject(config)).loader(config)
    return [(batch[0], batch[1]) for batch in loader]


@pytest.fixture(scope="session")
def cifar_batches(shared_data: Path) -> list[tuple[Tensor, Tensor]]:
    """192 real images as the CIFAR ResNets take them, with their labels."""
    with np.load(shared_data / "cifar10" / "test-1017.npz") as file:
        images = torch.from_numpy(file["images"][:192]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"][:192]).long()
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    return _batches((images - mean) / std, labels)
