"""Multiply-accumulates of layers against counts made by hand, and the coverage that follows from them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtool
from qtool.graph.macs import count_macs
from qtool.graph.trace import trace
from qtool.pipeline.coverage import coverage
from qtool.pipeline.steps import specs_for


class Calls(nn.Module):
    """A function of x as a network, with one module to call."""

    def __init__(self, function, module: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.module = module

    def forward(self, x):
        return self.function(self, x)


def work(net: nn.Module, *shape: int) -> float:
    return sum(layer.count for layer in count_macs(trace(net, torch.rand(shape))).values())


@pytest.mark.parametrize(
    "module, shape, expected",
    [
        (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 8, 8), 4 * 64 * 3 * 9),
        (nn.Conv2d(4, 4, 3, groups=4, stride=2), (2, 4, 9, 9), 4 * 16 * 9),
        (nn.Conv1d(3, 5, 2), (2, 3, 8), 5 * 7 * 3 * 2),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 3), 36 * 3 * 4),
        (nn.Linear(7, 5), (2, 3, 7), 3 * 7 * 5),
        (nn.Bilinear(3, 4, 5), None, 5 * 3 * 5),
        (nn.ReLU(), (2, 3), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_do_the_work_counted_by_hand(module, shape, expected):
    if shape is None:
        net = Calls(lambda self, x: self.module(x[:, :3], x[:, 3:]), module)
        assert work(net, 2, 7) == expected
    else:
        assert work(module, *shape) == expected


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda self, x: x @ x.transpose(1, 2), 3 * 3 * 4),
        (lambda self, x: torch.bmm(x, x.transpose(1, 2)), 3 * 3 * 4),
        (lambda self, x: torch.einsum("nik,njk->nij", x, x), 3 * 3 * 4),
        (lambda self, x: torch.einsum("...ik,...jk->...ij", x, x), 3 * 3 * 4),
        (lambda self, x: F.linear(x, self.module.weight), 3 * 4 * 5),
        (lambda self, x: self.module(x) * 2 + 1, 3 * 4 * 5),
    ],
)
def test_functions_do_the_work_counted_by_hand(function, expected):
    assert work(Calls(function, nn.Linear(4, 5)), 2, 3, 4) == expected


def test_work_does_not_depend_on_the_batch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    assert work(net, 1, 3, 8, 8) == work(net, 7, 3, 8, 8)


def test_what_cannot_be_counted_is_said():
    macs = count_macs(trace(nn.Sequential(nn.PReLU(), nn.RNNCell(4, 4)), torch.rand(2, 4)))
    assert {name: layer.known for name, layer in macs.items()} == {"1": False}


def test_coverage_names_what_stays_in_float(tiny_net):
    traced = trace(tiny_net, torch.rand(2, 3, 8, 8))
    everything = coverage(traced, specs_for(traced, qtool.QuantizeConfig()))
    assert everything.percent == 100
    assert everything.text == "100.0 % of 19.7 k multiply-accumulates run quantized"
    part = coverage(traced, specs_for(traced, qtool.QuantizeConfig(no_quant_layers=("fc",))))
    assert part.text.splitlines() == [
        "93.5 % of 19.7 k multiply-accumulates run quantized",
        "not: fc, 1.3 k (not asked for)",
    ]


def test_attention_runs_on_integers():
    traced = trace(
        Calls(lambda self, x: self.module(x, x, x)[0], nn.MultiheadAttention(8, 2)), torch.rand(3, 2, 8)
    )
    found = coverage(traced, specs_for(traced, qtool.QuantizeConfig()))
    assert found.percent == 100 and not found.left
