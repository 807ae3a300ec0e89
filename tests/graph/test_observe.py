import pytest
import torch
from torch import nn

from qtool.errors import StatsError
from qtool.graph.fast import fast
from qtool.graph.observe import NonFiniteError, model_stats, observe
from qtool.graph.trace import trace
from qtool.observers.stats import ModelStats

X = torch.linspace(-1, 3, 2 * 4).reshape(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.fc(x), x], 1) + torch.flatten(x, 1).repeat(1, 2)


def measured(net: nn.Module, batches) -> ModelStats:
    network = fast(trace(net, batches[0]))
    with observe(network) as observation, torch.no_grad():
        for number, x in enumerate(batches):
            observation.run(x, number, number * len(x))
    return model_stats(network, observation.sums())


def test_every_input_and_output_is_recorded_under_its_name():
    net = Net()
    stats = measured(net, [X, -X])
    y = net(X).detach(), net(-X).detach()
    assert list(stats.layers) == ["fc", "cat", "add"]  # flatten and repeat compute nothing
    assert sorted(stats.layers["cat"].inputs) == sorted(stats.layers["add"].inputs) == [0, 1]
    assert stats.input("fc", 0) == stats.input("cat", 1)
    assert (stats.input("fc", 0).min, stats.input("fc", 0).max) == (-3, 3)
    assert stats.input("cat", 0) == stats.output("fc")
    assert stats.input("add", 0) == stats.output("cat")
    assert stats.output("add").max == max(float(part.max()) for part in y)
    assert stats.output("add").total_numel == 32
    assert stats.output("add").shape == (1, 8)


def test_a_look_leaves_the_places_that_deviations_are_measured_from_and_nothing_else():
    network = fast(trace(Net(), X))
    with observe(network) as observation, torch.no_grad():
        observation.look(X[:1])
        assert observation.sums() == {}
        pivots = dict(observation.pivots)
        observation.run(-X, 0, 0)
    assert pivots and observation.pivots == pivots
    given = next(n.name for n in network.traced.graph.nodes if n.op == "placeholder")
    assert pivots[given] == pytest.approx(float(X[0].mean()))
    assert {key: part.pivot for key, part in observation.sums().items()} == pivots


def test_hooks_are_gone_afterwards_even_after_an_error():
    network = fast(trace(Net(), X))
    with pytest.raises(KeyboardInterrupt), observe(network):
        assert any(m._forward_hooks for m in network.traced.modules())
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.traced.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_that_gives_no_number_is_named(value):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(net[1].bias[:1], value)
    with pytest.raises(StatsError, match="the output of layer '1' holds NaN or infinity"):
        measured(net, [X])


def test_an_input_that_is_no_number_is_named():
    network = fast(trace(nn.Sequential(nn.Linear(4, 4)), X))
    bad = X.clone()
    bad[1, 2] = torch.nan
    with (
        observe(network) as observation,
        pytest.raises(NonFiniteError, match="the input 0 of layer '0'") as e,
    ):
        observation.run(bad, number=3, first=6)
    assert e.value.image == 7


def test_each_call_of_a_reused_module_has_its_own_record():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) * -1 + 1)

    stats = measured(Twice(), [X])
    assert stats.output("relu1").max == 3
    assert stats.output("relu2").max == 1


def test_a_vector_that_an_activation_writes_over_has_its_own_range():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.randn(16, 4)
    stats, y = measured(net, [x]), net[0](x).detach()
    assert stats.output("0").min == pytest.approx(float(y.min()), rel=1e-6) and float(y.min()) < 0
    assert stats.output("0").mean == pytest.approx(float(y.mean()), rel=1e-5)
    assert stats.output("1").min == 0


@pytest.mark.parametrize("images", [4, 5])
def test_a_part_of_a_tensor_in_another_shape_has_the_averages_of_its_images(images, caplog):
    class Channels(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, c].unsqueeze(1) * 2.0 for c in range(3)], 1)

    network = fast(trace(Channels(), torch.randn(2, 3, 4, 4)))
    x = torch.randn(images, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with observe(network) as observation, torch.no_grad():
        observation.run(x, 0, 0)
    record = model_stats(network, observation.sums()).input("mul2", 0)
    assert record.avg_max == pytest.approx(float(x[:, 1].flatten(1).amax(1).double().mean()), rel=1e-6)
    assert record.shape == (1, 1, 4, 4)
    assert not caplog.messages


def test_an_axis_of_images_that_cannot_be_told_is_said_once_for_each_operation(caplog):
    class Pairs(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            return ((x @ x.T) + 1.0) * 2.0 @ x

    network = fast(trace(Pairs(), torch.randn(2, 3, 4, 4)))
    with observe(network) as observation, torch.no_grad():
        for number in range(2):
            observation.run(torch.randn(5, 3, 4, 4), number, 5 * number)
    warned = [m for m in caplog.messages if "which axis holds the images cannot be told" in m]
    assert len(warned) == 3  # matmul, add, mul
