from dataclasses import replace

import torch
from torch import nn

from qtool.deploy.native import SIMULATED, convert, rules
from qtool.deploy.native.kernels import Rescale


def test_a_kernel_that_gives_something_else_is_not_used(quantized, kernel_batch, monkeypatch):
    class Off(nn.Module):
        """A kernel of a build of torch that is wrong by three steps."""

        def __init__(self, right):
            super().__init__()
            self.right = right

        def forward(self, *args):
            y = self.right(*args)
            return torch.quantize_per_tensor(
                y.dequantize() - 3 * y.q_scale(), y.q_scale(), y.q_zero_point(), torch.quint8
            )

    monkeypatch.setitem(rules.INTEGER_RULES, "cat", lambda site: Off(rules.lower_cat(site)))
    model = quantized(mode="asym_u")
    native = convert(model)
    layer = native.layers["cat"]
    assert layer.runs == SIMULATED
    assert layer.why.startswith("torch's kernel differs from the simulation by up to 3 steps, in ")
    assert torch.equal(native(kernel_batch).argmax(1), model(kernel_batch).argmax(1))


def test_what_a_kernel_refuses_is_simulated_with_its_words(quantized, monkeypatch):
    def refuse(site):
        raise RuntimeError("kernel: groups of 3\nare not supported")

    monkeypatch.setitem(rules.INTEGER_RULES, "mul", refuse)
    layer = convert(quantized()).layers["mul"]
    assert (layer.runs, layer.why) == (SIMULATED, "torch: kernel: groups of 3 are not supported")


def test_a_kernel_that_leaves_its_grid_is_caught(quantized, monkeypatch):
    # Without the clamp at the upper end of a 4-bit grid.
    def unclamped(site):
        return Rescale(site.inputs[0].scale / site.output.scale, replace(site.output, high=255))

    monkeypatch.setitem(rules.FLOAT_RULES, "relu", unclamped)
    monkeypatch.setitem(rules.FLOAT_RULES, "relu6", unclamped)
    native = convert(quantized(bits_activations=4, clip_activations="avg"))
    assert "differs from the simulation" in native.layers["own_relu6"].why
