"""Unsigned symmetric grids where values can never be negative (D10)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qtool
from qtool.errors import ConfigError


class Branches(nn.Module):
    """Two ReLUs concatenated and flattened, (N, 3, 6, 6) -> (N, 5)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x):
        both = torch.cat([F.relu(self.a(x)), torch.sigmoid(self.b(x))], 1)
        return self.fc(torch.flatten(F.max_pool2d(both, 2), 1))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stats(net, batch):
    return qtool.calibrate(net, [batch])


def modes(model):
    return {name: layer.output.spec.mode for name, layer in model.plan.layers.items() if layer.output}


@pytest.mark.parametrize("mode", ["sym", "sym_restr"])
def test_d10_grids_are_unsigned_wherever_nothing_negative_can_come(mode, net, stats):
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode=mode, symmetric_unsigned=True))
    unsigned = dict.fromkeys(("a", "sigmoid", "cat", "max_pool2d"), "sym_u")
    assert modes(model) == {**unsigned, "b": mode, "fc": mode}
    assert model.plan.layers["fc"].inputs[0].spec.mode == "sym_u"  # behind flatten
    assert model.plan.layers["a"].inputs[0].spec.mode == mode  # the image


def test_d10_the_step_is_half_as_wide_and_the_integers_use_all_bits(net, stats, batch):
    signed, unsigned = (
        qtool.quantize(net, stats, qtool.QuantizeConfig(symmetric_unsigned=wanted))
        for wanted in (False, True)
    )
    ratio = signed.plan.layers["a"].output.scale / unsigned.plan.layers["a"].output.scale
    assert float(ratio) == pytest.approx(2)  # 127.5 steps from 0 to v against 255
    integers = unsigned.integers(batch)["a"]
    assert int(integers.min()) == 0
    assert int(integers.max()) > 250  # quantized weights reach a little less than the measured maximum
    assert set(modes(signed).values()) == {"sym"}


def test_d10_each_unsigned_layer_loses_less(net, stats, batch):
    def error(**settings):
        model = qtool.quantize(net, stats, qtool.QuantizeConfig(bits_activations=4, **settings))
        return float((model(batch) - net(batch)).square().mean())

    assert error(symmetric_unsigned=True) < 0.7 * error()


def test_d10_numbers_that_happen_to_be_positive_decide_nothing(batch):
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    net[0].bias.data += 100
    model = qtool.quantize(net, qtool.calibrate(net, [batch]), qtool.QuantizeConfig(symmetric_unsigned=True))
    assert modes(model) == {"0": "sym"}


def test_d10_a_layer_can_be_excepted_and_chosen(net, stats):
    settings = {"symmetric_unsigned": True, "overrides": {"cat": {"symmetric_unsigned": False}}}
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(**settings))
    assert (modes(model)["cat"], modes(model)["a"]) == ("sym", "sym_u")
    settings = {"overrides": {"cat": {"symmetric_unsigned": True}}}
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(**settings))
    assert (modes(model)["cat"], modes(model)["a"]) == ("sym_u", "sym")


def test_d10_a_relu_that_is_left_out_rectifies_nothing(net, stats, batch):
    settings = {
        "symmetric_unsigned": True,
        "overrides": {"a": {"bits_activations": 0}, "relu": {"make_identity": True}},
    }
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(**settings))
    assert (modes(model)["cat"], modes(model)["max_pool2d"]) == ("sym", "sym")


def test_d10_an_asked_for_relu_makes_the_output_unsigned(net, stats):
    settings = {"symmetric_unsigned": True, "overrides": {"fc": {"clip_half_range": True}}}
    assert modes(qtool.quantize(net, stats, qtool.QuantizeConfig(**settings)))["fc"] == "sym_u"


def test_d10_a_saved_network_is_the_same(net, stats, batch, tmp_path):
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(symmetric_unsigned=True))
    again = qtool.load(qtool.save(model, tmp_path / "q.pth"), net, example=batch)
    assert torch.equal(model(batch), again(batch))


def test_d10_on_asymmetric_grids_only_it_is_refused(net, stats):
    with pytest.raises(ConfigError, match=r"^--qe-sym-unsigned: has no effect on asymmetric"):
        qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u", symmetric_unsigned=True))
