"""A trained network is the quantized network: in front of training, behind it, and what it is saved as."""

import pytest
import torch
from torch import nn

from qtool.algorithms.lsq import TrainedNetwork, why_not
from qtool.quantizers.plan import INTEGER
from qtool.quantizers.prepare import build


class Varied(nn.Module):
    """Residual and padded sums, concatenations, pooling, ReLU6, float gates, products, a transposed layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.act = nn.ReLU6()
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(24, 6, 2, stride=2, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.gate = nn.Hardswish()
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.conv2(self.act(self.conv1(x))))
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y = torch.relu(short + self.down(x))
        y = self.up(torch.cat([y, self.pool(torch.cat([x, x[:, :4]], 1))], 1))
        y = y * torch.sigmoid(y) + self.gate(y)
        return self.fc(self.dropout(y.mean((2, 3))))


@pytest.fixture
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Varied().eval()
        nn.init.uniform_(net.norm.weight, 0.5, 3)
        nn.init.normal_(net.norm.bias)
        return net


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(2)]


def _moved(trained):
    """Somewhere else, as training would leave it."""
    generator = torch.Generator().manual_seed(2)
    for kind, tensors in trained.parameters().items():
        for tensor in tensors.values():
            by = {"weights": 0.1, "biases": 0.02, "scales": 0.1}[kind]
            tensor.data += by * torch.randn(tensor.shape, generator=generator)
    return trained


def _assert_same(trained, batches):
    """Equal up to values between two steps, which floats break another way than integers: a few in 100."""
    quantized = build(*trained.quantized())
    with torch.no_grad():
        for x in batches:
            found, expected = trained(x), quantized(x)
            step = quantized.plan.layers["fc"].output
            close = (found - expected).abs() < 1e-5 + (0 if step is None else 1e-3 * float(step.scale))
            assert float(close.float().mean()) > 0.95
            largest = float(expected.abs().max())
            assert float((found - expected).abs().max()) < 0.1 * largest


SCHEMES = {
    "per channel": {"mode": "asym_u", "per_channel_weights": True, "bits_activations": 4},
    "symmetric": {"mode": "sym", "bits_activations": 8},
    "two bits": {"mode": "sym", "mode_activations": "asym_u", "bits_weights": 2, "bits_activations": 4},
    "asymmetric weights": {"mode": "asym_s", "per_channel_weights": True},
    "weights alone": {"bits_activations": 0, "per_channel_weights": True},
    "activations alone": {"bits_weights": 0, "mode": "asym_u"},
    "pools that hand on": {"mode": "asym_u", "bits_activations": 4, "max_pool_grid": "input"},
    "float ends": {"mode": "asym_u", "no_quant_layers": ("stem", "fc")},
}


@pytest.mark.parametrize("ranges", ["learned", "ema"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_untrained_network_is_the_quantized_one(net, batches, planned_w4, scheme, ranges):
    folded, plan = planned_w4(net, batches, **SCHEMES[scheme])
    trained = TrainedNetwork(folded, plan, ranges)
    _, found = trained.quantized()
    for name, layer in plan.layers.items():
        if layer.weight_q is not None:
            assert torch.equal(found.layers[name].weight_q, layer.weight_q)
            assert found.layers[name].weight.same_grid(layer.weight)
        if layer.output is not None:
            assert found.layers[name].output.same_grid(layer.output)
        assert all(
            a is b or a.same_grid(b) for a, b in zip(found.layers[name].inputs, layer.inputs, strict=True)
        )
    if ranges == "learned":  # ranges that follow are others behind the first batch
        _assert_same(trained, batches)


def test_a_pool_that_hands_on_its_input_s_grid_does_so_behind_training(net, batches, planned_w4):
    folded, plan = planned_w4(net, batches, **SCHEMES["pools that hand on"])
    trained = _moved(TrainedNetwork(folded, plan))
    assert "output.pool" not in trained.state()
    _, found = trained.quantized()
    source = next(name for name, layer in found.layers.items() if layer.output is found.layers["pool"].output)
    assert source.startswith("cat")
    assert not found.layers["pool"].output.same_grid(plan.layers["pool"].output)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_trained_network_is_what_it_is_saved_as(net, batches, planned_w4, scheme):
    trained = _moved(TrainedNetwork(*planned_w4(net, batches, **SCHEMES[scheme])))
    _assert_same(trained, batches)


def test_everything_on_a_grid_is_learned(net, batches, planned_w4):
    folded, plan = planned_w4(net, batches, **SCHEMES["per channel"])
    trained = TrainedNetwork(folded, plan)
    trained(batches[0]).square().sum().backward()
    without = {
        f"{kind}.{name}"
        for kind, tensors in trained.parameters().items()
        for name, tensor in tensors.items()
        if tensor.grad is None or not bool(tensor.grad.abs().max() > 0)
    }
    assert not without
    inputs = [key for key in trained.parameters()["scales"] if key.startswith("input.")]
    assert len(inputs) == sum(own is not None for layer in plan.layers.values() for own in layer.inputs) == 3


def test_the_given_network_and_plan_stay_as_they_were(net, batches, planned_w4):
    folded, plan = planned_w4(net, batches)
    before = {name: tensor.clone() for name, tensor in folded.traced.state_dict().items()}
    grids = {name: layer.output for name, layer in plan.layers.items()}
    _moved(TrainedNetwork(folded, plan)).quantized()
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.traced.state_dict().items())
    assert all(layer.output is grids[name] for name, layer in plan.layers.items())


@pytest.mark.parametrize("ranges", ["learned", "ema"])
def test_a_state_brings_another_one_to_the_same_network(net, batches, planned_w4, ranges):
    folded, plan = planned_w4(net, batches, **SCHEMES["per channel"])
    trained = _moved(TrainedNetwork(folded, plan, ranges))
    trained(batches[0])
    state = {name: tensor.clone() for name, tensor in trained.state().items()}
    other = TrainedNetwork(folded, plan, ranges)
    other.load_state(state)
    for (_, a), (_, b) in zip(
        trained.quantized()[1].layers.items(), other.quantized()[1].layers.items(), strict=True
    ):
        assert a.output is None or a.output.same_grid(b.output)
        assert a.weight_q is None or torch.equal(a.weight_q, b.weight_q)
    with pytest.raises(ValueError, match="another network"):
        other.load_state({**state, "weights.more": torch.zeros(1)})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(12, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.lstm(x.mean(1))[0][:, -1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"overrides": {"conv1": {"fpq_module": 16}}}, "'conv1': runs in a float type of 16 bits"),
        ({"scale_approx_bits": 8}, "approximated by integers"),
        ({"bits_accum": 8}, "does not simulate an accumulator that overflows"),
        ({"bits_weights": 0, "bits_activations": 0}, "nothing in it is quantized"),
    ],
)
def test_what_cannot_be_trained_is_said(net, batches, planned_w4, settings, reason):
    folded, plan = planned_w4(net, batches, **settings)
    assert reason in why_not(folded.traced, plan)
    with pytest.raises(ValueError, match=reason):
        TrainedNetwork(folded, plan)


def test_recurrent_layers_are_refused(batches, planned_w4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        folded, plan = planned_w4(Recurrent().eval(), batches)
    assert "recurrent" in why_not(folded.traced, plan)


def test_layers_with_integers_are_what_the_tests_above_are_about(net, batches, planned_w4):
    _, plan = planned_w4(net, batches)
    integers = {layer.op for layer in plan.layers.values() if layer.kind == INTEGER}
    assert {"conv", "conv_transpose", "linear", "add", "cat", "mul"} <= integers
