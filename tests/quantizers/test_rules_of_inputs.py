"""Which grid a layer reads its input on."""

import pytest
import torch
from torch import nn

import qtool
from qtool.quantizers.grids import Quantize
from qtool.quantizers.plan import INTEGER


@pytest.fixture
def quantized(varied_net, varied_stats):
    return lambda **settings: qtool.quantize(varied_net, varied_stats, qtool.QuantizeConfig(**settings))


class Function(nn.Module):
    """A function of x and the given modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def quantize(net, batch, **settings):
    return qtool.quantize(net, qtool.calibrate(net, [batch]), qtool.QuantizeConfig(**settings))


def test_a_layer_uses_its_producers_grid_and_not_its_own_statistics(quantized):
    layers = quantized().plan.layers
    assert layers["depthwise"].inputs == layers["gate"].inputs == (None,)
    assert layers["add"].inputs == layers["cat"].inputs == layers["mul"].inputs == (None, None)
    scales = layers["conv1"].output.scale.double() * layers["depthwise"].weight.scale.double()
    torch.testing.assert_close(layers["depthwise"].accum_scale, scales)


def test_flatten_ends_the_grid_and_dropout_does_not(quantized):
    layers = quantized().plan.layers
    assert layers["fc"].inputs[0] is not None
    x = torch.randn(4, 8, 5, 5)
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(), nn.Conv2d(8, 8, 1)).eval()
    assert quantize(net, x).plan.layers["2"].inputs == (None,)


def test_a_fresh_input_takes_the_bits_and_clip_of_the_output(quantized, varied_stats):
    settings = {"mode": "asym_u", "clip_activations": "avg", "overrides": {"fc": {"bits_activations": 6}}}
    grid = quantized(**settings).plan.layers["fc"].inputs[0]
    record = varied_stats.input("fc", 0)
    extent = max(record.avg_max, 0) - min(record.avg_min, 0)
    assert grid.spec.num_bits == 6
    assert float(grid.scale) == pytest.approx(extent / 63)


def test_no_clip_of_a_layer_unclips_its_fresh_input(quantized, varied_stats):
    model = quantized(mode="asym_u", clip_activations="avg", no_clip_layers=("fc",))
    grid = model.plan.layers["fc"].inputs[0]
    record = varied_stats.input("fc", 0)
    assert float(grid.scale) == pytest.approx((max(record.max, 0) - min(record.min, 0)) / 255)


@pytest.mark.parametrize("clip", ["laplace", "gauss"])
def test_a_fresh_input_has_its_full_range_even_in_front_of_a_fused_relu(quantized, varied_stats, clip):
    """D5: it had half a range if the output did."""
    record = varied_stats.input("conv1", 0)
    grid = quantized(mode="asym_u", clip_activations=clip).plan.layers["conv1"].inputs[0]
    alpha = {"laplace": 9.89 * record.b, "gauss": 3.92 * record.std}[clip]
    low = max(record.avg_min, record.mean - alpha)
    assert float(grid.scale) == pytest.approx((max(low + 2 * alpha, 0) - min(low, 0)) / 255)


def test_a_fresh_tensor_is_put_on_a_grid_of_each_reader():
    """D8: both readers got the grid of whichever ran first."""
    net = Function(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    x = torch.randn(4, 3, 5, 5)
    model = quantize(net, x, overrides={"b": {"bits_activations": 4}})
    assert [model.plan.layers[n].inputs[0].spec.num_bits for n in "ab"] == [8, 4]
    assert [m.spec.num_bits for m in model.network.modules() if isinstance(m, Quantize)] == [8, 4]


def test_maxpool_requantizes_on_its_own_statistics(quantized, varied_stats):
    layers = quantized(mode="asym_u").plan.layers
    assert layers["maxpool"].inputs == (None,)
    assert float(layers["maxpool"].output.scale) == pytest.approx(varied_stats.output("maxpool").max / 255)


def test_a_convolution_kept_in_float_leaves_a_relu_that_quantizes_its_own_input(quantized):
    layers = quantized(no_quant_layers=("conv1",)).plan.layers
    assert layers["conv1"].kind == "float"
    assert layers["relu1"].kind == "fake"
    assert layers["relu1"].inputs[0] is not None
    assert quantized().plan.layers["relu1"].kind == "identity"


def test_acts_only_convolutions_read_float(quantized):
    layers = quantized(bits_weights=0).plan.layers
    assert (layers["conv1"].kind, layers["conv1"].inputs) == ("fake", (None,))


def test_per_channel_error_of_a_grouped_transposed_convolution_is_half_a_step_of_its_own_channel():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
    layer.weight.data *= torch.tensor([1.0, 10.0, 0.1])[None, :, None, None]
    model = quantize(nn.Sequential(layer), torch.randn(2, 4, 3, 3), per_channel_weights=True)
    plan = model.plan.layers["0"]
    assert plan.weight.scale.shape == (6,)
    for channel in range(6):
        group, j = divmod(channel, 3)
        weight = layer.weight.detach()[group * 2 : group * 2 + 2, j]
        survived = plan.weight_q[channel].float() * plan.weight.scale[channel]
        # The largest saturates by half a step; float32 rounding on top.
        assert (weight - survived).abs().max() <= plan.weight.scale[channel] * 0.5001
        assert float(plan.weight.scale[channel]) == pytest.approx(float(weight.abs().max()) / 127.5)


LAYERS = {
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "same": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 6, 6)),
    "strided, in groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "1d": (nn.Conv1d(3, 4, 3, padding=2), (2, 3, 9)),
    "3d": (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), (2, 4, 3, 3, 3)),
    "linear on a sequence": (nn.Linear(5, 7), (2, 3, 5)),
}


@pytest.mark.parametrize("settings", [{}, {"mode": "asym_u", "per_channel_weights": True}], ids=str)
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_every_layer_with_weights_computes_on_integers_to_8_bit_precision(case, settings):
    layer, shape = case
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    net = nn.Sequential(layer).eval()
    model = quantize(net, x, **settings)
    assert model.plan.layers["0"].kind == INTEGER
    y, y_hat = net(x), model(x)
    # Three roundings of 8 bits each lose less than this; an error of layout loses much more.
    assert 10 * torch.log10(y.square().sum() / (y - y_hat).square().sum()) > 30


def test_several_outputs_stay_in_float_and_say_why():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            values, _ = torch.sort(self.fc(x))
            return values * 2

    model = quantize(Sorts(), torch.randn(8, 4))
    plan = model.plan.layers["sort"]
    assert (plan.kind, plan.note) == ("float", "gives several tensors")
    assert model.plan.layers["mul"].inputs[0] is not None
