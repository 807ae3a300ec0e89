"""What a quantized network costs."""

import pytest
import torch
from torch import nn

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.search.costs import Costs, costs


class Two(nn.Module):
    """A convolution with 54 weights and 6 biases, then a linear layer with 24 weights and 4 biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, (3, 1), bias=True), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


X = torch.zeros(1, 3, 5, 2)
CONV_MACS, FC_MACS = 54 * 3 * 2, 24


def costs_of(**settings: object) -> Costs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Two().eval()
        model = qtool.quantize(net, qtool.calibrate(net, [torch.randn_like(X)]), QuantizeConfig(**settings))
    return costs(fold_batch_norms(trace(net, X)).traced, model.plan)


def test_bytes_and_bit_operations_are_those_of_the_bits():
    found = costs_of(bits_weights=4, bits_activations=8)
    assert found.size_bytes == 27 + 12 + 4 * 10
    assert found.size_share == pytest.approx((27 + 12 + 40) / (4 * 88))
    assert found.bit_operations_share == pytest.approx(4 * 8 / 1024)
    assert found.float_macs_share == 0.0


def test_layers_in_float_count_as_such():
    found = costs_of(no_quant_layers=("fc",))
    assert found.size_bytes == 54 + 4 * 24 + 40
    total = CONV_MACS + FC_MACS
    assert found.float_macs_share == pytest.approx(FC_MACS / total)
    assert found.bit_operations_share == pytest.approx((CONV_MACS * 64 + FC_MACS * 1024) / (1024 * total))


def test_weights_alone_save_memory_and_half_of_the_operations():
    found = costs_of(bits_activations=0)
    assert found.size_bytes == 78 + 40 and found.float_macs_share == 1.0
    assert found.bit_operations_share == pytest.approx(8 / 32)


def test_a_shared_weight_counts_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    net[2].weight = net[0].weight
    x = torch.randn(2, 4)
    model = qtool.quantize(net, qtool.calibrate(net, [x]), QuantizeConfig(bits_weights=4))
    assert costs(fold_batch_norms(trace(net, x)).traced, model.plan).size_bytes == 8 + 2 * 16
