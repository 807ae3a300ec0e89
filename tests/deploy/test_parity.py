import torch
from torch import nn

import qtool
from qtool.deploy.native import convert
from qtool.deploy.parity import Difference, parity, parity_text


def test_a_difference_counts_steps_and_equal_values():
    a, b = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 5, 3])
    assert Difference.of(a, b) == Difference(largest=2, equal=0.5)


def test_a_layer_that_is_off_is_named_and_the_next_is_not_blamed(quantized, kernel_batch):
    model = quantized(mode="asym_u", mode_weights="sym")
    native = convert(model)
    right = native.network.get_submodule("squeeze")

    class Off(nn.Module):
        def forward(self, x):
            y = right(x)
            return torch.quantize_per_tensor(
                y.dequantize() + 4 * y.q_scale(), y.q_scale(), y.q_zero_point(), torch.quint8
            )

    native.network.set_submodule("squeeze", Off())
    layers = parity(model, native, kernel_batch)
    assert layers["squeeze"].alone.largest == 4 and layers["squeeze"].alone.equal < 0.1
    assert layers["hardswish"].alone.largest <= 1
    assert layers["hardswish"].in_network.largest > 1
    assert layers["cat"].in_network.largest <= 1
    text = parity_text(layers)
    assert "largest difference 4 steps" in text and "(squeeze)" in text


def test_equal_networks_say_so(kernel_batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    stats = qtool.calibrate(net, [kernel_batch])
    model = qtool.quantize(net, stats, qtool.QuantizeConfig(mode="asym_u"))
    text = parity_text(parity(model, convert(model), kernel_batch))
    assert text.splitlines() == [
        "int8 kernels given the simulation's integers: 2 layers, largest difference 0 steps, at least "
        "100.000 % of values equal (0)",
        "in the network: all integers of 2 layers equal",
    ]
