"""Networks that torch.fx cannot trace: captured by torch.export, under the same names."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import qtool
from qtool.errors import ModelError
from qtool.graph import trace as tracing
from qtool.graph.capture import exported, symbolic
from qtool.graph.trace import layers, trace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Loops(nn.Module):
    """A loop over a tensor's size and a shared convolution, which fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(2 * 3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1]):
            x = x + self.relu(self.bn(self.conv(x)))
        x = torch.cat([x, F.relu(x)], 1)
        x += 1
        return self.fc(x.flatten(1))


def names(traced: torch.fx.GraphModule) -> list[str]:
    return [name for name, _, _ in layers(traced)]


@pytest.fixture
def by_export(monkeypatch):
    """Trace without the symbolic trace."""

    def run(net: nn.Module, example: object):
        with monkeypatch.context() as patch:
            patch.setattr(tracing, "capture", exported)
            return trace(net, example)

    return run


def test_a_loop_on_a_size_is_captured():
    with pytest.raises(TypeError):
        symbolic(Loops(), X)
    expected = [f"{part}{i}" for i in (1, 2, 3) for part in ("conv", "bn", "relu", "add")]
    assert names(trace(Loops(), X)) == [*expected, "relu4", "cat", "add4", "fc"]


def test_modules_are_torchs_own_again():
    kinds = {name: type(module) for name, _, module in layers(trace(Loops(), X))}
    assert kinds["conv2"] is nn.Conv2d and kinds["bn2"] is nn.BatchNorm2d and kinds["fc"] is nn.Linear


def test_batches_of_other_sizes_pass():
    net, x = Loops().eval(), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, X)(x), net(x))
        torch.testing.assert_close(trace(net, X[:1])(x), net(x))


def test_it_is_quantized_saved_loaded_and_evaluated(tmp_path):
    net = Loops().eval()
    batches = [(X, torch.tensor([0, 1]))]
    quantized = qtool.quantize(net, qtool.calibrate(net, batches), qtool.QuantizeConfig(mode="asym_u"))
    qtool.save(quantized, tmp_path / "q.pth")
    again = qtool.load(tmp_path / "q.pth", Loops(), X)
    assert torch.equal(again(X), quantized(X))
    assert qtool.evaluate(again, batches).images == 2
    assert {layer.kind for layer in quantized.plan.layers.values()} <= {"integer", "fake", "identity"}


def test_several_inputs_and_named_outputs(by_export):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y=None, scale=2.0):
            return {"sum": self.a(x) + self.b(y), "scaled": x * scale}

    net, x, y = Net().eval(), torch.randn(2, 4), torch.randn(2, 4)
    for example in ((x, y), {"x": x, "y": y}):
        for way in (trace, by_export):
            traced = way(net, example)
            assert names(traced) == ["a", "b", "add", "mul"]
            found = traced(**example) if isinstance(example, dict) else traced(*example)
            with torch.no_grad():
                torch.testing.assert_close(found, net(x, y))


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("mobilenet_v3_small", marks=pytest.mark.slow)])
def test_names_are_those_of_the_symbolic_trace(arch, by_export):
    net = torchvision.models.get_model(arch).eval()
    x = torch.randn(2, 3, 64, 64)
    assert names(by_export(net, x)) == names(trace(net, x))


class Unforeseeable(nn.Module):
    """Makes a number of Python of a tensor's values, which no graph can hold."""

    def forward(self, x):
        return -x if float(x.sum()) > 0 else x


def test_a_network_that_cannot_be_captured_is_one_line_and_no_noise(capfd):
    with pytest.raises(ModelError, match=r"test_export_capture\.py:\d+ \(return -x if") as raised:
        trace(Unforeseeable(), torch.ones(2, 3))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700
    assert capfd.readouterr() == ("", "")
