"""Masks of a softmax are told from the network's code, and stay out of what is measured."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtool
from qtool.errors import QtoolError
from qtool.graph.trace import layers, trace

CASES = {
    "masked_fill": (lambda m, x: x.masked_fill(m.hidden, -math.inf), True),
    "masked_fill in place": (lambda m, x: (x + 1).masked_fill_(m.hidden, -math.inf), True),
    "a large number": (lambda m, x: x.masked_fill(m.hidden, -1e9), True),
    "the largest number": (lambda m, x: x.masked_fill(m.hidden, torch.finfo(torch.float32).min), True),
    "nothing hidden on the example": (lambda m, x: x.masked_fill(x > 1e6, -math.inf), True),
    "where": (lambda m, x: torch.where(m.hidden, -math.inf, x), True),
    "a buffer": (lambda m, x: x + m.mask, True),
    "made in forward": (lambda m, x: x + torch.full((4, 4), -math.inf).triu(1), True),
    "the complement of a mask": (lambda m, x: x + (1.0 - (x > 0).float()) * -10000.0, True),
    "through dropout and reshaping": (lambda m, x: F.dropout(x + m.mask, training=False).flatten(1), True),
    "behind a softmax": (lambda m, x: torch.softmax(x + m.mask, -1), False),
    "behind a matrix product": (lambda m, x: torch.softmax(x + m.mask, -1) @ x, False),
    "a fill with zeros": (lambda m, x: x.masked_fill(m.hidden, 0.0), False),
    "a factor": (lambda m, x: x * -3.0, False),
}


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("hidden", torch.ones(4, 4, dtype=torch.bool).triu(1))
        self.register_buffer("mask", torch.zeros(4, 4).masked_fill(self.hidden, -math.inf))

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("case", CASES)
def test_which_results_are_masks(case):
    function, expected = CASES[case]
    traced = trace(Net(function), torch.rand(2, 4, 4))
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    assert output.args[0].meta["unbounded"] == expected


def test_an_input_that_holds_a_mask_is_one():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return torch.softmax(x + mask, -1)

    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -math.inf)
    marks = {n: node.meta["unbounded"] for n, node, _ in layers(trace(Masked(), (torch.rand(2, 4, 4), mask)))}
    assert marks == {"add": True, "softmax": False}


def test_masks_are_not_measured():
    net = Net(lambda m, x: torch.softmax(x.masked_fill(m.hidden, -math.inf), -1))
    stats = qtool.calibrate(net, [torch.rand(2, 4, 4)])
    assert stats.layers["masked_fill"].output is None
    assert stats.layers["softmax"].inputs == {}
    assert 0 <= stats.output("softmax").min <= stats.output("softmax").max <= 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_broken_weight_is_no_mask(value):
    net = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)).eval()
    net[0].bias.data[0] = value
    with pytest.raises(QtoolError, match="NaN or infinity"):
        qtool.calibrate(net, [torch.rand(2, 4)])
