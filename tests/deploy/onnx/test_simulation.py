import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.native.target import has_vnni
from qtool.deploy.onnx import qdq_model, to_model
from qtool.deploy.onnx.parity import onnx_parity
from qtool.deploy.onnx.simulation import simulation
from qtool.errors import ConfigError

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="without VNNI onnxruntime's kernels may saturate")


class Residual(nn.Module):
    """Sums of values on both sides of zero, so that zero points are in the middle."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU6(), nn.Conv2d(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.deep(x)
        return self.fc(x.mean([2, 3]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def images():
    return torch.randn(32, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def quantized(net, images, **settings):
    config = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True, **settings}
    return qtool.quantize(net, qtool.calibrate(net, [images[:8]]), qtool.QuantizeConfig(**config))


def differences(model, written_of, images):
    written = qdq_model(written_of, tuple(images.shape[1:]))
    return {
        name: round((1 - layer.equal) * images.numel())
        for name, layer in onnx_parity(model, written, to_model(written, "net"), images).items()
    }


@needs_vnni
@pytest.mark.parametrize("add_rounding", ["inputs", "sum"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_integer_is_that_of_onnxruntime(add_rounding, per_channel, net, images):
    model = quantized(net, images, add_rounding=add_rounding, per_channel_weights=per_channel)
    assert set(differences(simulation(model), model, images).values()) == {0}


class Sums(nn.Module):
    """Sums of two convolutions, with other scales and zero points for each seed."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        for conv in (self.first, self.second):
            conv.weight.data = torch.randn(8, 3, 1, 1, generator=generator)
            conv.bias.data = torch.randn(8, generator=generator)

    def forward(self, x):
        return self.first(x) + self.second(x)


@needs_vnni
@pytest.mark.parametrize("settings", [{}, {"bits_activations": 4}], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_every_sum_is_that_of_onnxruntime(seed, settings, images):
    model = quantized(Sums(seed).eval(), images, add_rounding="sum", **settings)
    assert set(differences(simulation(model), model, images).values()) == {0}


def test_the_simulation_itself_is_that_of_other_kernels(net, images):
    model = quantized(net, images)
    assert any(differences(model, model, images).values())


def test_the_simulation_that_was_given_stays_as_it_was(net, images):
    model = quantized(net, images)
    before = model(images[:4])
    simulation(model)
    assert torch.equal(model(images[:4]), before)


@pytest.mark.parametrize("settings", [{"scale_approx_bits": 8}, {"bits_activations": 16}])
def test_what_onnxruntime_computes_in_another_way_stays_as_it_is(settings, net, images):
    model = quantized(net, images, **settings)
    assert torch.equal(simulation(model)(images[:4]), model(images[:4]))


def test_dynamic_mode_is_refused(net):
    model = qtool.quantize(net, None, qtool.QuantizeConfig(dynamic=True), example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="--qe-dynamic finds them batch by batch"):
        simulation(model)
