"""Where the channels of a layer go, on small networks whose answer can be seen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qtool.graph.flow import flow, shared_parameters
from qtool.graph.trace import layers, trace


def followed(net, example, name):
    traced = trace(net.eval(), example)
    return flow(traced, next(node for n, node, _ in layers(traced) if n == name))


class Made(nn.Module):
    """A network of a function and layers."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(c_in, c_out, k=1, **more):
    return nn.Conv2d(c_in, c_out, k, **more)


def test_a_flattened_channel_is_read_by_a_block_of_inputs():
    net = Made(
        lambda m, x: m.fc(torch.flatten(F.max_pool2d(F.relu(m.a(x)), 4), 1)),
        a=conv(3, 5),
        fc=nn.Linear(20, 2),
    )
    (reader,) = followed(net, IMAGE, "a").readers
    assert reader.channels.tolist() == [c for c in range(5) for _ in range(4)]
    assert (reader.name, reader.passed, reader.shifts) == ("fc", ("relu",), True)


@pytest.mark.parametrize(
    ("pool", "shifts"),
    [
        (nn.MaxPool2d(3, padding=1), True),
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(3, padding=1), False),  # zeros count
        (nn.AdaptiveAvgPool2d(3), True),
        (nn.ZeroPad2d(1), False),
        (nn.ReflectionPad2d(1), True),
    ],
)
def test_factors_pass_pools_and_constants_pass_those_without_zeros(pool, shifts):
    net = Made(lambda m, x: m.b(m.pool(m.a(x))), a=conv(3, 4), b=conv(4, 2), pool=pool)
    (reader,) = followed(net, IMAGE, "a").readers
    assert reader.channels.tolist() == [0, 1, 2, 3] and reader.shifts is shifts


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda m, x: m.b(F.hardswish(m.a(x))), "hardswish"),
        (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
        (lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), "add"),
        (lambda m, x: m.b(torch.cat([m.a(x)], 1)), "cat"),
        (lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=2.0)), "pad"),
        (lambda m, x: m.b(m.a(x).transpose(1, 2)), "mixes"),
        (lambda m, x: m.a(x), "network's output"),
    ],
)
def test_what_lets_no_factor_through_is_named(function, word):
    found = followed(Made(function, a=conv(3, 8), b=conv(8, 8)), IMAGE, "a")
    assert any(word in stop.why for stop in found.stops)
    assert all(bool(stop.channels.all()) for stop in found.stops)


def test_reading_the_shape_of_a_tensor_stops_nothing():
    net = Made(
        lambda m, x: (lambda y: m.fc(y.view(y.shape[0], y.size(1), -1).mean(2)))(m.a(x)),
        a=conv(3, 4), fc=nn.Linear(4, 2)
    )  # fmt: skip
    found = followed(net, IMAGE, "a")
    assert not found.stops and found.readers[0].channels.tolist() == [0, 1, 2, 3]


def test_shuffled_channels_are_followed():
    net = Made(lambda m, x: m.b(m.s(m.a(x))), a=conv(3, 6), b=conv(6, 2), s=nn.ChannelShuffle(2))
    (reader,) = followed(net, IMAGE, "a").readers
    assert reader.channels.tolist() == [0, 3, 1, 4, 2, 5]


def test_all_readers_of_one_tensor_are_found():
    net = Made(lambda m, x: (lambda y: m.b(y).sum() + m.c(y).sum())(F.relu(m.a(x))),
               a=conv(3, 4), b=conv(4, 2), c=conv(4, 3))  # fmt: skip
    found = followed(net, IMAGE, "a")
    assert [reader.name for reader in found.readers] == ["b", "c"] and not found.stops


def test_the_values_of_attention_go_to_its_output_and_the_scores_stop_the_rest():
    net = Made(
        lambda m, x: m.att(x, x, x, need_weights=False)[0], att=nn.MultiheadAttention(6, 2, batch_first=True)
    )
    found = followed(net, torch.randn(2, 5, 6), "att.in_proj")
    (reader,), (stop,) = found.readers, found.stops
    assert reader.name == "att.out_proj" and reader.channels.tolist() == [12, 13, 14, 15, 16, 17]
    assert stop.channels.tolist() == [True] * 12 + [False] * 6
    assert not reader.shifts


def test_layers_with_weights_in_common_know_each_other():
    net = Made(lambda m, x: m.b(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 4))
    assert shared_parameters(trace(net.eval(), IMAGE)) == {"b1": "b2", "b2": "b1"}
