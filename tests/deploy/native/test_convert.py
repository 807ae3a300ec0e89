"""The converted network against the simulation, whose arithmetic other tests hold to Distiller's."""

import pytest
import torch
from torch import nn

import qtool
from qtool.deploy.native import IN_FLOAT, INT8, SIMULATED, Target, convert, integers, supported_backends
from qtool.deploy.parity import parity
from qtool.errors import ConfigError
from qtool.models import load_model
from qtool.numerics.spec import MODES

# What runs on int8 kernels in kernel_net, whatever the settings, as long as weights are symmetric.
ON_KERNELS = {
    *("conv1", "depthwise", "few_groups", "add1", "maxpool", "own_relu", "own_relu6", "cat", "squeeze"),
    *("hardswish", "leaky", "add2", "gate", "sigmoid", "mul", "fc1", "fc2"),
}


def on_kernels(native):
    return {name for name, layer in native.layers.items() if layer.runs == INT8}


def assert_same_up_to_ties(model, native, x, share=0.999):
    for name, layer in parity(model, native, x).items():
        assert layer.alone.largest <= 1, (name, layer)
        assert layer.alone.equal >= share, (name, layer)
    assert torch.equal(model(x).argmax(1), native(x).argmax(1))


@pytest.mark.parametrize("backend", supported_backends())
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_grid_gives_the_simulations_integers(mode, per_channel, backend, quantized, kernel_batch):
    model = quantized(mode=mode, mode_weights="sym", per_channel_weights=per_channel)
    native = convert(model, Target.here(backend))
    assert_same_up_to_ties(model, native, kernel_batch)
    # A sum whose ratio to its inputs is 1/2, which symmetric grids bring about, meets too many ties.
    assert on_kernels(native) | {"add2"} >= ON_KERNELS


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("mode", ["asym_u", "asym_s"])
def test_weights_with_zero_points_give_the_simulations_integers(mode, backend, quantized, kernel_batch):
    model = quantized(mode=mode, per_channel_weights=True)
    native = convert(model, Target.here(backend))
    assert_same_up_to_ties(model, native, kernel_batch)
    assert {"conv1", "few_groups", "squeeze", "fc1", "fc2"} <= on_kernels(native)


@pytest.mark.parametrize("bits", [(4, 4), (6, 8), (8, 2), (7, 7)])
@pytest.mark.parametrize("mode", ["sym", "asym_u"])
def test_grids_below_8_bits_are_clamped_to_their_own_range(mode, bits, quantized, kernel_batch):
    model = quantized(mode=mode, bits_activations=bits[0], bits_weights=bits[1])
    native = convert(model)
    assert_same_up_to_ties(model, native, kernel_batch * 3)  # far beyond what calibration saw
    assert len(on_kernels(native)) >= len(ON_KERNELS) - 1


@pytest.mark.parametrize("mode", ["asym_u", "sym"])
def test_conversion_before_and_after_the_first_forward_is_the_same(mode, quantized, kernel_batch):
    # Distiller's D20: after a forward with asymmetric weights it converted garbage.
    model = quantized(mode=mode)
    before = convert(model)
    model(kernel_batch)
    after = convert(model)
    assert torch.equal(before(kernel_batch), after(kernel_batch))
    assert (model(kernel_batch).argmax(1) == after(kernel_batch).argmax(1)).all()


def test_layers_without_bias_are_converted(quantized, kernel_batch):
    # Distiller's D20: AttributeError on None.
    model = quantized(mode="asym_u")
    layers = parity(model, convert(model), kernel_batch)
    for name in ("conv1", "squeeze", "fc1"):
        assert model.plan.layers[name].bias_q is None
        assert layers[name].runs == INT8 and layers[name].alone.largest <= 1


def test_the_given_network_stays_as_it_was(quantized, kernel_batch):
    model = quantized()
    code, logits = model.network.code, model(kernel_batch)
    convert(model)
    assert model.network.code == code
    assert torch.equal(model(kernel_batch), logits)


def test_scales_and_zero_points_are_those_of_the_simulation(quantized, kernel_batch):
    model = quantized(mode="asym_u")
    native = convert(model)
    container, output = native.layers["squeeze"].container, model.plan.layers["squeeze"].output
    assert (container.scale, container.zero_point) == (float(output.scale), int(output.zero_point))
    found = []
    layer = native.network.get_submodule("squeeze")
    layer.register_forward_hook(lambda _m, _a, y: found.append((y.q_scale(), y.q_zero_point())))
    native(kernel_batch)
    assert found == [(1.0, int(output.zero_point))]  # in steps


def test_integers_are_those_of_the_grid_asked_for(quantized, kernel_batch):
    model = quantized(mode="asym_s", bits_activations=5)
    for name, values in integers(convert(model), kernel_batch).items():
        spec = model.plan.layers[name].output.spec
        assert int(values.min()) >= spec.quant_min and int(values.max()) <= spec.quant_max, name


def test_the_embedded_network_predicts_the_same(digits_batches):
    net = load_model().model
    stats = qtool.calibrate(net, [images for images, _ in digits_batches[:2]])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True))
    simulated, native = qtool.evaluate(model, digits_batches), qtool.evaluate(convert(model), digits_batches)
    assert torch.equal(simulated.predictions, native.predictions)
    assert simulated.top1 > 97


def test_a_cifar_resnet_predicts_the_same_on_real_images(shared_data, cifar_batches):
    net = load_model("resnet20", checkpoint=shared_data / "cifar10" / "resnet20.pth").model
    stats = qtool.calibrate(net, [images for images, _ in cifar_batches[:2]])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u", per_channel_weights=True))
    native = convert(model)
    assert all(layer.runs != SIMULATED for layer in native.layers.values())
    simulated, found = qtool.evaluate(model, cifar_batches), qtool.evaluate(native, cifar_batches)
    assert torch.equal(simulated.predictions, found.predictions)
    assert simulated.top1 > 85


def test_training_is_refused(quantized):
    with pytest.raises(RuntimeError, match="for evaluation only"):
        convert(quantized()).train()


# What stays off int8 kernels, and what is refused


def layer_of(native, name):
    return native.layers[name].runs, native.layers[name].why


def test_activations_above_8_bits_are_simulated(kernel_net, kernel_stats, kernel_batch):
    config = qtool.QuantizeConfig(overrides={"squeeze": {"bits_activations": 12}})
    model = qtool.quantize(kernel_net, kernel_stats, config)
    native = convert(model)
    assert layer_of(native, "squeeze") == (SIMULATED, "its output has 12 bits; --qe-bits-acts 8 or fewer")
    assert layer_of(native, "hardswish") == (IN_FLOAT, "its input has 12 bits; --qe-bits-acts 8 or fewer")
    assert_same_up_to_ties(model, native, kernel_batch)


def test_weights_above_8_bits_are_simulated(kernel_net, kernel_stats, kernel_batch):
    config = qtool.QuantizeConfig(overrides={"fc1": {"bits_weights": 10}})
    model = qtool.quantize(kernel_net, kernel_stats, config)
    native = convert(model)
    assert layer_of(native, "fc1") == (SIMULATED, "its weight has 10 bits; --qe-bits-wts 8 or fewer")
    assert_same_up_to_ties(model, native, kernel_batch)


def test_float_and_half_precision_layers_stay_as_they_are(kernel_net, kernel_stats, kernel_batch):
    config = qtool.QuantizeConfig(
        no_quant_layers=("squeeze", "avgpool"),
        overrides={"fc1": {"fpq_module": 16}, "(gate|few_groups)": {"bits_activations": 0}},
    )
    model = qtool.quantize(kernel_net, kernel_stats, config)
    native = convert(model)
    assert layer_of(native, "squeeze") == (IN_FLOAT, "not asked for")
    assert layer_of(native, "fc1") == (IN_FLOAT, "runs in a float type of its own")
    assert layer_of(native, "gate") == (IN_FLOAT, "only its weights are quantized; --qe-bits-acts 8")
    assert layer_of(native, "few_groups") == (INT8, "")  # it reads integers, and gives floats
    assert_same_up_to_ties(model, native, kernel_batch)


def test_dynamic_mode_is_refused(kernel_net, kernel_batch):
    model = qtool.quantize(kernel_net, None, qtool.QuantizeConfig(dynamic=True), example=kernel_batch)
    with pytest.raises(ConfigError, match="--qe-dynamic finds them batch by batch"):
        convert(model)


def test_a_network_without_any_int8_layer_is_refused_with_the_reason(quantized):
    with pytest.raises(
        ConfigError, match=r"no layer .*'conv1': only its weights are quantized; --qe-bits-acts 8"
    ):
        convert(quantized(bits_activations=0))


def test_a_function_with_other_tensors_keeps_them(kernel_batch):
    class Scaled(nn.Module):
        """A buffer, a number found from the shape, dropout, and one tensor added to itself."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.dropout = nn.Dropout()
            self.register_buffer("factor", torch.tensor([0.5, 1.0, 2.0, 3.0]).reshape(1, 4, 1, 1))

        def forward(self, x):
            y = self.dropout(self.conv(x))
            y = (y + y) * self.factor
            return y.reshape(y.shape[0], -1) / y.shape[1]

    net = Scaled().eval()
    stats = qtool.calibrate(net, [kernel_batch])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u"))
    native = convert(model)
    assert native.layers["add"].runs != SIMULATED
    assert torch.equal(native(kernel_batch[:3]), model(kernel_batch[:3]))


class Shuffling(nn.Module):
    """Views values in their order in memory, in a float part and where a grid ends."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        groups = x.view(x.size(0), 2, 3, 8, 8).transpose(1, 2).contiguous()
        return self.last(groups.view(x.size(0), 6, 8, 8)).view(x.size(0), -1)


def test_views_are_given_values_in_their_usual_order():
    torch.manual_seed(0)
    net, x = Shuffling().eval(), torch.randn(4, 3, 8, 8)
    model = qtool.quantize(net, qtool.calibrate(net, [x]), qtool.QuantizeConfig(mode="asym_u"))
    assert torch.allclose(convert(model)(x), model(x), atol=0.05)
