"""nn.LSTM and nn.GRU as layers: the same numbers for any length, and named parts."""

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
    assert names == ["layers.0.0.input", "layers.0.0.cell.hidden", "layers.0.0.cell.project"]


def test_parts_have_names():
    names = [name for name, _, _ in layers(trace(Classifier(nn.LSTM(4, 6, batch_first=True), 6), X))]
    cell = "rnn.layers.0.0.cell"
    assert names[:4] == ["rnn.layers.0.0.input", f"{cell}.hidden", f"{cell}.add1", f"{cell}.sigmoid1"]
    assert names[-1] == "fc"


def test_batches_of_other_sizes_pass():
    net = Classifier(nn.GRU(4, 6, batch_first=True), 6).eval()
    x = torch.rand(7, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, X)(x), net(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first, bidirectional", [*itertools.product([False, True], repeat=2)])
def test_sequences_of_any_length_pass(cls, batch_first, bidirectional):
    torch.manual_seed(0)
    rnn = cls(4, 6, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    traced = trace(rnn, X)
    for shape in ((1, 1, 4), (2, 9, 4), (7, 3, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(traced(x), rnn(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_a_single_sequence_needs_no_batch(cls):
    rnn = cls(4, 6, bidirectional=True)
    traced = trace(rnn, X[0])
    with torch.no_grad():
        for x in (X[0], X[0, :2]):
            torch.testing.assert_close(traced(x), rnn(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_a_state_may_be_an_input(cls):
    torch.manual_seed(0)
    rnn = cls(4, 6, num_layers=2)
    state = torch.randn(2, 5, 6)
    example = (X, (state, state + 1)) if cls is nn.LSTM else (X, state)
    with torch.no_grad():
        torch.testing.assert_close(trace(rnn, example)(*example), rnn(*example), atol=1e-5, rtol=0)


def test_a_state_goes_from_one_layer_to_another():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.writer = nn.GRU(4, 6, batch_first=True), nn.GRU(4, 6, batch_first=True)

        def forward(self, x):
            _, state = self.reader(x)
            return self.writer(x.flip(1), state)[0]

    net, x = Translator(), torch.randn(2, 8, 4)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, X)(x), net(x), atol=1e-5, rtol=0)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ModelError, match="a sequence without steps"):
        trace(Classifier(nn.LSTM(4, 6, batch_first=True), 6), X)(torch.rand(3, 0, 4))


def test_packed_sequences_are_refused_with_the_reason():
    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x):
            lengths = torch.tensor([5, 3, 2])
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][0]

    with pytest.raises(
        ModelError, match=r"module 'rnn' takes a packed sequence, .* give it the padded tensor"
    ):
        trace(Packing(), X)


def test_a_branch_and_a_recurrent_module_go_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            output = self.rnn(x)[0] if x.mean() > 0 else self.rnn(-x)[0].flip(1)
            return self.fc(output[:, -1])

    net = Net().eval()
    traced = trace(net, X)
    for length in (2, 6):
        for sign in (-1, 1):
            x = sign * torch.rand(3, length, 4)
            with torch.no_grad():
                torch.testing.assert_close(traced(x), net(x), atol=1e-5, rtol=0)


def test_plain_rnn_stays_one_layer():
    traced = trace(Classifier(nn.RNN(4, 6, batch_first=True), 6), X)
    assert [name for name, _, _ in layers(traced)] == ["rnn", "fc"]


@pytest.mark.parametrize("cls, gates", [(nn.LSTM, 4), (nn.GRU, 3)])
def test_work_is_that_of_the_opaque_module(cls, gates):
    macs = count_macs(trace(Classifier(cls(4, 6, batch_first=True), 6), X))
    assert sum(layer.count for layer in macs.values()) == 5 * gates * 6 * (4 + 6) + 6 * 3
