import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.native import IN_FLOAT, INT8, SIMULATED, Target, convert, integers, supported_backends
from qtool.deploy.native.containers import ToGrid
from qtool.deploy.native.kernels import Add, Conv, Mean, PinnedConv, RoundedAdd

needs_vnni = pytest.mark.skipif(not Target.here().vnni, reason="without VNNI such layers are simulated")


def converted(net, x, target=None, **settings):
    """The simulation's integers, the converted network's, and that network."""
    stats = qtool.calibrate(net.eval(), [x])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(**settings))
    native = convert(model, target)
    return model.integers(x), integers(native, x), native


def assert_same(expected, found):
    for name, values in expected.items():
        steps = (values - found[name]).abs()
        assert int(steps.max()) <= 1 and float((steps == 0).double().mean()) > 0.998, name


def seeded(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).requires_grad_(False)


class Average(nn.Module):
    def forward(self, x):
        return x.mean([2, 3])


IMAGES = torch.rand(2, 16, 9, 9, generator=torch.Generator().manual_seed(3)) * 2 - 0.5


@pytest.mark.parametrize("backend", supported_backends())
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "groups": 4},
        {"padding": (0, 1), "bias": False},
        {"padding": 1, "groups": 16},
    ],
)
def test_convolutions_keep_their_geometry(settings, backend):
    net = seeded(nn.Conv2d(16, 16, 3, **settings))
    expected, found, native = converted(net, IMAGES, Target.here(backend), mode="asym_u", mode_weights="sym")
    assert_same(expected, found)
    assert native.layers["0"].runs == INT8


@pytest.mark.parametrize("layer", [nn.Conv1d(16, 6, 3), nn.Conv3d(16, 6, 3)])
def test_convolutions_of_one_and_three_dimensions(layer):
    dims = layer.weight.dim() - 2
    x = torch.rand(2, 16, *[5] * dims, generator=torch.Generator().manual_seed(0))
    expected, found, native = converted(seeded(layer), x, mode="asym_u", mode_weights="sym")
    assert_same(expected, found)
    assert native.layers["0"].runs == INT8


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (
            nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect"),
            "int8 kernels pad with zeros, not by 'reflect'",
        ),
        (nn.Conv2d(16, 4, 2, padding="same"), "int8 kernels pad both sides alike, and 'same' needs one more"),
        (nn.ConvTranspose2d(16, 4, 2), "no int8 kernel for 'conv_transpose'"),
    ],
)
def test_what_kernels_cannot_do_is_simulated(layer, why):
    expected, found, native = converted(seeded(nn.Conv2d(16, 16, 1), layer), IMAGES)
    assert native.layers["1"].runs == SIMULATED and native.layers["1"].why.startswith(why)
    assert_same(expected, found)


def test_a_narrow_accumulator_is_simulated():
    net = seeded(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    expected, found, native = converted(net, IMAGES, overrides={"0": {"bits_accum": 16}})
    assert native.layers["0"].runs == SIMULATED
    assert native.layers["0"].why.startswith("its sums can exceed 16 bits")
    assert_same(expected, found)


def test_a_channel_next_to_nothing_with_a_bias_at_the_end_of_its_accumulator_is_converted():
    net = seeded(nn.Conv2d(16, 16, 1))
    net[0].weight[3] *= 1e-12
    expected, found, native = converted(net, IMAGES, per_channel_weights=True)
    assert native.layers["0"].runs == INT8
    assert_same(expected, found)


# Saturation


DEPTHWISE = {"padding": 1, "groups": 112}
WIDE = torch.rand(2, 112, 12, 12, generator=torch.Generator().manual_seed(3)) * 2 - 0.5


@needs_vnni
@pytest.mark.parametrize("backend", [b for b in ("x86", "fbgemm") if b in supported_backends()])
def test_depthwise_convolutions_avoid_the_kernel_that_saturates(backend):
    # Large weights of one sign, and large inputs: fbgemm's depthwise kernel is off by many steps.
    net = seeded(nn.Conv2d(112, 112, 3, **DEPTHWISE))
    net[0].weight.abs_().clamp_(min=0.2)
    settings = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True}
    expected, found, native = converted(net, WIDE, Target.here(backend), **settings)
    layer = native.network.get_submodule("0")
    assert type(layer) is PinnedConv and native.layers["0"].saturating == 112
    assert_same(expected, found)
    saturates = Conv(layer.weights, layer.geometry, layer.source, layer.output, "fbgemm")
    x = ToGrid(layer.source)(WIDE)
    assert int((saturates(x).int_repr().int() - layer(x).int_repr().int()).abs().max()) > 1


def test_depthwise_convolutions_that_cannot_saturate_stay_on_their_engine():
    net = seeded(nn.Conv2d(112, 112, 3, **DEPTHWISE))
    expected, found, native = converted(net, WIDE, mode="asym_u", mode_weights="sym", bits_activations=7)
    assert type(native.network.get_submodule("0")) is Conv
    assert_same(expected, found)


def test_without_vnni_layers_that_could_saturate_are_simulated():
    target = Target("x86", vnni=False)
    net = seeded(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    for name in ("0", "1"):
        net.get_submodule(name).weight.abs_()
    safe = {"1": {"bits_weights": 6}}
    _, _, native = converted(net, IMAGES, target, mode="asym_u", mode_weights="sym", overrides=safe)
    assert native.layers["0"].runs == SIMULATED
    why = "sums of 16 of 16 channels could saturate on this processor; --qe-reduce-range"
    assert native.layers["0"].why.startswith(why)
    assert native.layers["1"].runs == INT8


# Sums


class Residual(nn.Module):
    """Two branches of given sizes, and their sum, with or without ReLU."""

    def __init__(self, first, second, relu=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.first.weight.data *= first
        self.second.weight.data *= second
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x):
        return self.relu(self.first(x) + self.second(x))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(1.0, 3.0), (3.0, 1.0), (1.0, 1.1)])
@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
def test_both_inputs_of_a_sum_are_rounded_before_they_are_added(mode, sizes, relu):
    expected, found, native = converted(Residual(*sizes, relu=relu), IMAGES, mode=mode)
    assert native.layers["add"].runs in (INT8, IN_FLOAT)
    assert_same(expected, found)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("sizes", [(1.0, 3.0), (1.0, 1.1)])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_sum_that_is_rounded_once_runs_on_an_int8_kernel(bits, sizes, relu):
    net = Residual(*sizes, relu=relu)
    settings = {"mode": "asym_u", "bits_activations": bits, "add_rounding": "sum"}
    expected, found, native = converted(net, IMAGES, **settings)
    assert isinstance(native.network.get_submodule("add"), Add)
    assert_same(expected, found)


@pytest.mark.parametrize("seed", range(8))
def test_a_sum_that_is_rounded_once_gives_every_integer_of_the_simulation(seed):
    a, b = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    settings = {"mode": "asym_u", "add_rounding": "sum"}
    expected, found, native = converted(Residual(0.3 + a, 0.3 + b), IMAGES, **settings)
    assert isinstance(native.network.get_submodule("add"), Add)
    assert all(torch.equal(values, found[name]) for name, values in expected.items())


def test_a_sum_that_is_rounded_once_by_other_ratios_is_added_in_float():
    settings = {
        "mode": "asym_u",
        "add_rounding": "sum",
        "scale_approx_bits": 4,
        "scale_approx_everywhere": True,
    }
    expected, found, native = converted(Residual(1.0, 1.7), IMAGES, **settings)
    assert native.layers["add"].runs == IN_FLOAT and "other ratios" in native.layers["add"].why
    assert_same(expected, found)


def test_a_sum_of_an_input_that_fits_the_outputs_grid_runs_on_an_int8_kernel():
    expected, found, native = converted(Residual(0.5, 3.0), IMAGES, mode="asym_u")
    assert isinstance(native.network.get_submodule("add"), Add)
    assert_same(expected, found)


def test_a_sum_of_two_inputs_beyond_the_outputs_range_is_added_in_float():
    # They all but cancel.
    net = Residual(1.0, 1.0)
    net.second.weight.data = -net.first.weight.data * 0.9
    expected, found, native = converted(net, IMAGES, mode="asym_u")
    assert isinstance(native.network.get_submodule("add"), RoundedAdd)
    assert native.layers["add"].runs == IN_FLOAT and "rounds both inputs" in native.layers["add"].why
    assert_same(expected, found)


@pytest.mark.parametrize("everywhere", [False, True])
def test_approximated_ratios_are_those_of_the_simulation(everywhere):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return torch.cat([a * b, a + b], 1)

    torch.manual_seed(0)
    net = Products()
    settings = {"scale_approx_bits": 5, "scale_approx_everywhere": everywhere}
    expected, found, native = converted(net, IMAGES, mode="asym_u", **settings)
    assert native.layers["mul"].runs == SIMULATED and "--qe-scale-approx-bits" in native.layers["mul"].why
    assert native.layers["cat"].runs == (SIMULATED if everywhere else INT8)
    # Convolutions take the approximated ratio itself.
    assert native.layers["a"].runs == native.layers["b"].runs == INT8
    assert_same(expected, found)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize(
    "mean",
    [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, 3)), nn.AvgPool2d(3, 2, padding=1), Average()],
)
def test_means_add_up_integers_in_any_order_in_memory(mean, bits):
    net = seeded(nn.Conv2d(16, 16, 3), mean)
    expected, found, native = converted(net, IMAGES, mode="asym_u", mode_weights="sym", bits_activations=bits)
    assert_same(expected, found)
    assert Mean in {type(module) for module in native.network.modules()}
    layer = list(native.layers.values())[-1]
    assert layer.runs == IN_FLOAT and "added up in float" in layer.why


def test_a_mean_in_a_float_type_of_its_own_stays_there():
    net = seeded(nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1))
    overrides = {"1": {"fpq_module": 16}}
    expected, found, native = converted(net, IMAGES, mode="asym_u", mode_weights="sym", overrides=overrides)
    assert_same(expected, found)
    assert "float type" in native.layers["1"].why
