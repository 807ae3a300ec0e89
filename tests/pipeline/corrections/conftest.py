"""A network that has something to equalize."""

import pytest
import torch
from torch import nn


@pytest.fixture
def linked_net() -> nn.Module:
    """Three convolutions, each read by the next alone, with channels of very uneven ranges; (N, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(5)
    convs = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 3)]
    for conv in convs:
        shape = conv.weight.shape
        uneven = torch.logspace(-1, 1, shape[0]).reshape(-1, 1, 1, 1)
        conv.weight.data = torch.randn(shape, generator=generator) * uneven / shape[1:].numel() ** 0.5
        conv.bias.data = torch.randn(shape[0], generator=generator)
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(convs[0], norm, nn.ReLU(), convs[1], nn.ReLU6(), convs[2], nn.Flatten()).eval()
