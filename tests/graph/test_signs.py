"""Which values can never be negative follows from the operations, not from the numbers seen (D10)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qtool.graph.signs import never_negative
from qtool.graph.trace import layers

SHAPE = (2, 4, 8, 8)
CASES = {
    "relu": (lambda m, x: F.relu(x), True),
    "relu6": (lambda m, x: F.relu6(x), True),
    "sigmoid": (lambda m, x: torch.sigmoid(x), True),
    "hardsigmoid": (lambda m, x: F.hardsigmoid(x), True),
    "softmax": (lambda m, x: x.softmax(-1), True),
    "clamp from 0": (lambda m, x: x.clamp(min=0.0), True),
    "clamp from -1": (lambda m, x: x.clamp(-1.0, 1.0), False),
    "max pool": (lambda m, x: F.max_pool2d(x.relu(), 2), True),
    "max pool of anything": (lambda m, x: F.max_pool2d(x, 2), False),
    "average pool": (lambda m, x: F.adaptive_avg_pool2d(x.relu(), 1), True),
    "mean": (lambda m, x: x.relu().mean((2, 3)), True),
    "through flatten": (lambda m, x: torch.flatten(x.relu(), 1) + 1, True),
    "through dropout": (lambda m, x: F.max_pool2d(F.dropout(x.relu(), training=False), 2), True),
    "cat": (lambda m, x: torch.cat([x.relu(), x.sigmoid()], 1), True),
    "cat with anything": (lambda m, x: torch.cat([x.relu(), x], 1), False),
    "sum": (lambda m, x: x.relu() + x.sigmoid(), True),
    "sum with a negative number": (lambda m, x: x.relu() - (-1) + (-2), False),
    "difference": (lambda m, x: x.sigmoid() - x.relu(), False),
    "product": (lambda m, x: x.relu() * x.sigmoid(), True),
    "product with a negative number": (lambda m, x: x.relu() * -2.0, False),
    "product with constants": (lambda m, x: x.relu() * torch.ones(8), True),
    "product with negative constants": (lambda m, x: x.relu() * -torch.ones(8), False),
    "silu": (lambda m, x: F.silu(x), False),
    "gelu": (lambda m, x: F.gelu(x), False),
    "a convolution of a ReLU": (lambda m, x: m.conv(x.relu()), False),
}


def last_layer(traced):
    return list(layers(traced))[-1][1]


@pytest.mark.parametrize("case", CASES)
def test_d10_what_can_never_be_negative(case, traced_lambda):
    function, expected = CASES[case]
    traced = traced_lambda(function, SHAPE, conv=nn.Conv2d(4, 4, 1))
    assert (last_layer(traced) in never_negative(traced, set(), set())) == expected


def test_a_layer_that_takes_over_a_relu_counts_and_one_left_out_does_not(traced_lambda):
    traced = traced_lambda(
        lambda m, x: F.max_pool2d(m.act(m.conv(x)), 2), SHAPE, conv=nn.Conv2d(4, 4, 1), act=nn.ReLU()
    )
    nodes = {name: node for name, node, _ in layers(traced)}
    assert nodes["conv"] in never_negative(traced, {"conv"}, set())
    assert never_negative(traced, set(), {"act"}) == set()
