"""A graph walked node by node on several batches."""

import pytest
import torch
from torch import nn

from qtool.graph.trace import layers, trace
from qtool.graph.walk import Walk


def _nodes(traced):
    return {name: node for name, node, _ in layers(traced)}


def test_a_whole_walk_gives_the_network_s_outputs(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk = Walk(traced, tiny_batches)
    walk.past(_nodes(traced)["fc"])
    with torch.no_grad():
        for found, batch in zip(walk.values(_nodes(traced)["fc"]), tiny_batches, strict=True):
            assert torch.equal(found, tiny_net(batch))


def test_in_front_of_a_layer_its_arguments_are_there(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk, node = Walk(traced, tiny_batches), _nodes(traced)["depthwise"]
    walk.before(node)
    with torch.no_grad():
        expected = tiny_net.relu1(tiny_net.bn1(tiny_net.conv1(tiny_batches[1])))
    (x,), _ = walk.arguments(node)[1]
    assert torch.equal(x, expected)


def test_what_is_not_needed_any_more_is_freed(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk, nodes = Walk(traced, tiny_batches), _nodes(traced)
    walk.before(nodes["fc"])
    assert all(len(values) == 1 for values in walk._values)
    with pytest.raises(KeyError):
        walk.values(nodes["conv1"])


def test_a_kept_value_stays(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    nodes = _nodes(traced)
    walk = Walk(traced, tiny_batches, keep=[nodes["conv1"]])
    walk.before(nodes["fc"])
    assert torch.equal(walk.values(nodes["conv1"])[0], tiny_net.conv1(tiny_batches[0]))


def test_a_replaced_layer_runs_in_its_place(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk, nodes = Walk(traced, tiny_batches), _nodes(traced)
    walk.before(nodes["fc"])
    traced.set_submodule("fc", nn.Linear(128, 3))
    walk.past(nodes["fc"])
    assert walk.values(nodes["fc"])[0].shape == (4, 3)


def test_there_is_no_way_back(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk, nodes = Walk(traced, tiny_batches), _nodes(traced)
    walk.past(nodes["fc"])
    with pytest.raises(ValueError, match="past conv1"):
        walk.before(nodes["conv1"])


def test_values_further_on_can_be_looked_at_from_where_the_walk_stands(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    walk, nodes = Walk(traced, tiny_batches), _nodes(traced)
    walk.before(nodes["depthwise"])
    assert walk.has_run(nodes["relu1"]) and not walk.has_run(nodes["depthwise"])
    held = [set(values) for values in walk._values]
    with torch.no_grad():
        expected = [tiny_net(batch) for batch in tiny_batches]
    assert all(map(torch.equal, walk.ahead(nodes["fc"]), expected))
    assert [set(values) for values in walk._values] == held
    assert not walk.has_run(nodes["depthwise"])
    with pytest.raises(KeyError):
        list(walk.ahead(nodes["conv1"]))
