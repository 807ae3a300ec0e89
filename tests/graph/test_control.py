"""Graphs with branches and loops: what runs, how often, and what copies of them do."""

import copy

import pytest
import torch
from torch import fx, nn

from qtool.graph.control import UncapturedPath, decide, is_steered
from qtool.graph.trace import copy_graph, layers, trace


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.mean() > 0 else self.b(x)


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Branches().eval(), torch.rand(2, 4))


def test_copies_branch_too():
    original = traced()
    for copied in (copy_graph(original), copy.deepcopy(original)):
        for x in (torch.ones(2, 4), -torch.ones(2, 4)):
            assert torch.equal(copied(x), original(x))


def test_what_is_inserted_behind_a_skipped_node_is_skipped():
    net = copy_graph(traced())
    ran = []

    def note(x):
        ran.append(float(x.mean()))
        return x

    (node,) = (node for name, node, _ in layers(net) if name == "a")
    with net.graph.inserting_after(node):
        inserted = net.graph.call_function(note, (node,))
    node.replace_all_uses_with(inserted, delete_user_cb=lambda user: user is not inserted)
    inserted.meta["op"] = "note"
    net.recompile()
    net(-torch.ones(2, 4))
    assert ran == []
    net(torch.ones(2, 4))
    assert len(ran) == 1


def test_only_graphs_with_decisions_or_loops_are_steered():
    assert is_steered(traced().graph)
    assert not is_steered(trace(nn.Linear(4, 4), torch.rand(2, 4)).graph)
    assert is_steered(trace(nn.LSTM(4, 4), torch.rand(3, 2, 4)).graph)


def test_a_loop_runs_its_layers_once_for_each_step():
    net = trace(nn.GRU(4, 4), torch.rand(3, 2, 4))
    calls = []
    net.get_submodule("layers.0.0.cell.hidden").register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(6, 2, 4))
    assert len(calls) == 6


@pytest.mark.parametrize("value, refusal", [(torch.tensor(1.0), "up"), (torch.tensor(0.0), "down")])
def test_an_outcome_without_a_branch_says_why(value, refusal):
    with pytest.raises(UncapturedPath, match=refusal):
        decide(value, 0, "net.py:1", "down", "up")
