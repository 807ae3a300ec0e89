"""nn.LSTM and nn.GRU as layers: the same numbers, named parts, and errors instead of wrong lengths."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.graph.macs import count_macs
from qtool.graph.trace import layers, trace

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """A recurrent network whose last output is classified."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.fc(output[:, -1])


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first, bidirectional, bias", [*itertools.product([False, True], repeat=3)])
def test_output_and_state_are_torchs(cls, batch_first, bidirectional, bias):
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "bias": bias}
    rnn = cls(4, 6, num_layers=2, **options)
    with torch.no_grad():
        torch.testing.assert_close(trace(rnn, X)(X), rnn(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_a_given_state_is_used(cls):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = cls(4, 6, batch_first=True)

        def forward(self, x):
            state = x.new_ones(1, x.shape[0], 6) * 0.5
            return self.rnn(x, (state, state) if cls is nn.LSTM else state)

    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        torch.testing.assert_close(trace(net, X)(X), net(X), atol=1e-5, rtol=0)


def test_projections_are_layers():
    rnn = nn.LSTM(4, 6, proj_size=2)
    with torch.no_grad():
        torch.testing.assert_close(trace(rnn, X)(X), rnn(X), atol=1e-5, rtol=0)
    names = [name for name, node, _ in layers(trace(rnn, X)) if node.meta["op"] == "linear"]
    assert names[:3] == ["layers.0.0.input", "layers.0.0.cell.hidden1", "layers.0.0.cell.project1"]


def test_parts_have_names():
    names = [name for name, _, _ in layers(trace(Classifier(nn.LSTM(4, 6, batch_first=True), 6), X))]
    cell = "rnn.layers.0.0.cell"
    assert names[:4] == ["rnn.layers.0.0.input", f"{cell}.hidden1", f"{cell}.add1", f"{cell}.sigmoid1"]
    assert names[-1] == "fc"


def test_batches_of_other_sizes_pass():
    net = Classifier(nn.GRU(4, 6, batch_first=True), 6).eval()
    x = torch.rand(7, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, X)(x), net(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [4, 6])
def test_sequences_of_another_length_are_refused(steps):
    traced = trace(Classifier(nn.LSTM(4, 6, batch_first=True), 6), X)
    with pytest.raises(ModelError, match=f"traced with sequences of 5 steps, and found one of {steps}"):
        traced(torch.rand(3, steps, 4))


def test_plain_rnn_stays_one_layer():
    traced = trace(Classifier(nn.RNN(4, 6, batch_first=True), 6), X)
    assert [name for name, _, _ in layers(traced)] == ["rnn", "fc"]


@pytest.mark.parametrize("cls, gates", [(nn.LSTM, 4), (nn.GRU, 3)])
def test_work_is_that_of_the_opaque_module(cls, gates):
    macs = count_macs(trace(Classifier(cls(4, 6, batch_first=True), 6), X))
    assert sum(layer.count for layer in macs.values()) == 5 * gates * 6 * (4 + 6) + 6 * 3
