import torch
from torch import nn

from qtool.graph.fast import fast
from qtool.graph.liveness import most_live_bytes
from qtool.graph.trace import trace

FLOAT = 4


def live(net: nn.Module, x: torch.Tensor) -> int:
    return most_live_bytes(trace(net, x))


def test_a_chain_holds_the_input_and_the_result_of_one_layer():
    net = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 20), nn.Linear(20, 1))
    assert live(net, torch.zeros(2, 10)) == 2 * (30 + 20) * FLOAT


def test_a_shortcut_is_held_until_it_is_added():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.narrow = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x):
            return x + self.narrow(self.widen(x))

    assert live(Residual(), torch.zeros(1, 8)) == (8 + 64 + 8) * FLOAT


def test_what_is_written_over_needs_no_memory_of_its_own():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)).eval()
    traced = trace(net, torch.zeros(1, 3, 4, 4))
    assert most_live_bytes(traced) == 2 * 8 * 16 * FLOAT
    # The flattened tensor still counts as one of its own.
    assert most_live_bytes(fast(traced).traced) == 2 * 8 * 16 * FLOAT
    short = trace(net[:2], torch.zeros(1, 3, 4, 4))
    assert most_live_bytes(fast(short).traced) == (3 + 8) * 16 * FLOAT


def test_both_inputs_of_one_layer_may_be_the_same_tensor():
    class Double(nn.Module):
        def forward(self, x):
            return (x + x) * 2.0

    assert live(Double(), torch.zeros(1, 5)) == 2 * 5 * FLOAT
