"""Running a graph again after a change: the numbers of a whole run, for the price of what is behind it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from qtool.graph.replay import Replay, needed, num_bytes
from qtool.graph.trace import trace


class Branches(nn.Module):
    """Two branches from one convolution, one of them split, a residual sum, and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        first, second = self.right(x).split([4, 2], 1)
        x = x + self.left(x).relu() * first
        return self.head(x.mean((2, 3)) + second.sum())


@pytest.fixture
def traced() -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trace(Branches(), torch.randn(2, 3, 6, 6))


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 6, 6, generator=generator) for n in (3, 3, 2)]


LAYERS = ("stem", "left", "right", "head")


def replace_layer(network: fx.GraphModule, name: str, factor: float) -> None:
    layer = copy.deepcopy(network.get_submodule(name))
    with torch.no_grad():
        layer.weight *= factor
    network.set_submodule(name, layer)


def calls(network: fx.GraphModule) -> dict[str, int]:
    """Counts the calls of each layer from now on."""
    count = dict.fromkeys(LAYERS, 0)
    for name in LAYERS:

        def note(*_, name=name):
            count[name] += 1

        network.get_submodule(name).register_forward_pre_hook(note)
    return count


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sets(st.sampled_from(LAYERS), max_size=2), st.floats(0.5, 2)), max_size=6),
    st.sampled_from([0, 2000, 10**9]),
)
def test_the_numbers_are_those_of_a_whole_run(changes, max_bytes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, batches = trace(Branches(), torch.randn(2, 3, 6, 6)), list(torch.randn(3, 2, 3, 6, 6))
    replay = Replay(network, batches, max_bytes)
    with torch.no_grad():
        list(replay.run())
        for names, factor in changes:
            for name in names:
                replace_layer(network, name, factor)
            for batch, found in zip(batches, replay.run(names), strict=True):
                assert torch.equal(found, network(batch))
            assert replay.kept_bytes <= max_bytes


@torch.no_grad()
def test_a_run_starts_where_the_last_one_changed(traced, batches):
    replay = Replay(traced, batches)
    list(replay.run())
    list(replay.run({"left"}))
    count = calls(traced)
    list(replay.run({"left"}))
    assert count == {"stem": 0, "right": 0, "left": 3, "head": 3}
    list(replay.run({"head"}))
    list(replay.run({"head"}))
    assert count["left"] == 6  # once more, as its result had not been kept
    assert count["stem"] == count["right"] == 0


@torch.no_grad()
def test_batches_without_room_run_from_the_input(traced, batches):
    whole = Replay(traced, batches)
    for _ in range(2):
        list(whole.run({"head"}))
    room = whole.kept_bytes * 3 // 8  # the batches hold 3, 3 and 2 images
    replay = Replay(traced, batches, room)
    list(replay.run({"head"}))
    assert 0 < replay.kept_bytes <= room
    count = calls(traced)
    list(replay.run({"head"}))
    assert count == {"stem": 2, "right": 2, "left": 2, "head": 3}


@torch.no_grad()
def test_a_run_that_was_not_finished_leaves_nothing_wrong(traced, batches):
    replay = Replay(traced, batches)
    list(replay.run({"head"}))
    replace_layer(traced, "stem", 2.0)
    next(replay.run({"stem"}))
    for batch, found in zip(batches, replay.run(()), strict=True):
        assert torch.equal(found, traced(batch))


@torch.no_grad()
def test_the_time_behind_a_layer_shrinks_with_its_depth(traced, batches):
    replay = Replay(traced, batches)
    assert replay.seconds_behind({"stem"}) is None
    list(replay.run())
    seconds = [replay.seconds_behind({name}) for name in ("stem", "left", "head")]
    assert seconds[0] > seconds[1] > seconds[2] > 0


def test_only_what_the_output_needs_runs(traced):
    nodes = {node.name: node for node in traced.graph.nodes}
    found = {n.name for n in needed(traced.graph, {nodes["stem"], nodes["x"]})}
    assert "stem" not in found and {"left", "right", "head"} <= found


def test_shared_memory_counts_once(traced):
    x = torch.zeros(10)
    first, second, *_ = traced.graph.nodes
    assert num_bytes({first: (x, x[2:4]), second: [x.reshape(2, 5), 3]}) == 40
