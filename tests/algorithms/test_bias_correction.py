"""Biases that take back the shift of the mean: the vectors of the NNCF case, chains, guards."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qtool.algorithms.bias_correction import (
    FastBiasSettings,
    SequentialBiasSettings,
    correct_bias,
    correct_bias_sequentially,
    effective_weight,
    guarded,
)
from qtool.algorithms.channel_means import MeanInput, mean_output
from qtool.numerics.affine import along_axis, quantize_centered
from qtool.quantizers.prepare import build
from qtool.quantizers.weighted import weighted_function

PASSES = {"fast": correct_bias, "sequential": correct_bias_sequentially}


def _biases(folded):
    modules = dict(folded.traced.named_modules())
    return {n: m.bias.detach() for n, m in modules.items() if getattr(m, "bias", None) is not None}


# The unit test of NNCF's fast bias correction: conv 1 -> 2, its weights on a grid of 2 / 127, where the
# ties 63.5 become 63.
WEIGHT = torch.tensor([[[[0.1, -2.0], [1.0, 0.1]]], [[[0.1, 2.0], [-1.0, 0.1]]]])
INTEGERS = torch.tensor([[[[6, -127], [63, 6]]], [[[6, 127], [-63, 6]]]])
BIAS = torch.tensor([0.1, 1.0])


def _nncf_case():
    conv = nn.Conv2d(1, 2, 2)
    conv.weight.data, conv.bias.data = WEIGHT.clone(), BIAS.clone()
    np.random.seed(0)
    return conv, torch.tensor(np.random.rand(1, 1, 4, 4), dtype=torch.float32)


def _mean(conv, x, weight):
    return mean_output(MeanInput.of(conv, [x]), weighted_function(conv), weight)


def test_the_form_with_a_constant_input_moves_the_bias_the_wrong_way():
    """NNCF's expected value: what it takes for the error of the weights is structure in the image."""
    conv, x = _nncf_case()
    blob = x.mean().expand_as(x)
    found = BIAS + _mean(conv, x, WEIGHT) - _mean(conv, blob, INTEGERS * 2 / 127)
    assert found.tolist() == pytest.approx([0.0288348, 1.0838453], abs=2e-7)
    unquantized = BIAS + _mean(conv, x, WEIGHT) - _mean(conv, blob, WEIGHT)
    assert unquantized.tolist() == pytest.approx([0.01805, 1.08205], abs=5e-6)


def test_the_difference_form_moves_it_the_right_way():
    conv, x = _nncf_case()
    for image, expected in ((x.mean().expand_as(x), [0.11078, 1.00180]), (x, [0.11085, 1.00173])):
        found = BIAS + _mean(conv, image, WEIGHT) - _mean(conv, image, INTEGERS * 2 / 127)
        assert found.tolist() == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("correct", PASSES.values(), ids=PASSES)
def test_the_passes_find_the_true_correction_of_the_nncf_case(correct, planned):
    conv, x = _nncf_case()
    case = planned(nn.Sequential(conv), [x], mode="sym_restr", per_channel_weights=True, bits_activations=0)
    layer = case.plan.layers["0"]
    assert torch.equal(layer.weight.scale, torch.full((2,), 2 / 127))
    case.plan = replace(case.plan, layers={"0": replace(layer, weight_q=INTEGERS.to(layer.weight_q.dtype))})
    folded, plan, report = correct(*case.given, layers=["0"])
    assert _biases(folded)["0"].tolist() == pytest.approx([0.11085, 1.00173], abs=5e-6)
    assert plan.layers["0"].bias.tolist() == pytest.approx([0.11085, 1.00173], abs=5e-6)
    assert report.changed[0].change == pytest.approx(0.0110 / 1.005, abs=1e-4)


@pytest.mark.parametrize("correct", PASSES.values(), ids=PASSES)
def test_weights_that_lie_on_their_grid_need_no_correction(correct, tiny_net, tiny_batches, planned):
    for name in ("conv1", "depthwise", "fc"):
        layer = tiny_net.get_submodule(name)
        layer.weight.data = torch.randint(-127, 128, layer.weight.shape).float() / 64
        layer.weight.data.flatten(1)[:, 0] = 127 / 64
    tiny_net.bn1 = tiny_net.bn2 = nn.Identity()
    settings = {"mode": "sym_restr", "per_channel_weights": True, "bits_activations": 0}
    case = planned(tiny_net, tiny_batches, **settings)
    fc = case.reference.get_submodule("fc").bias
    found = _biases(correct(*case.given, layers=case.names)[0])
    assert list(found) == ["conv1", "depthwise", "fc"]
    for name, expected in {"conv1": torch.zeros(8), "depthwise": torch.zeros(8), "fc": fc}.items():
        assert torch.allclose(found[name], expected, atol=1e-6)


@pytest.mark.parametrize("correct", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("bits", [0, 8], ids=["weights only", "W3A8"])
def test_little_of_the_mean_error_is_left(correct, bits, tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches, bits_weights=3, bits_activations=bits)
    before = case.mean_error(case.folded, case.plan)
    folded, plan, report = correct(*case.given, layers=case.names)
    left = {"fast": 0.5, "sequential": 0.1}[next(n for n, p in PASSES.items() if p is correct)]
    assert case.mean_error(folded, plan) < left * before
    assert not report.left


@pytest.mark.parametrize("correct", PASSES.values(), ids=PASSES)
def test_nothing_given_is_changed(correct, tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches, bits_weights=3)
    before, plan = case.mean_error(case.folded, case.plan), case.plan
    correct(*case.given, layers=case.names)
    assert case.plan is plan
    assert case.mean_error(case.folded, plan) == before


def test_the_sequential_form_mends_what_layers_in_front_have_left(relu_chain, planned):
    overrides = {"14": {"bits_activations": 12}}  # the last one: rounding its output is no matter of biases
    case = planned(*relu_chain, bits_weights=4, bits_activations=4, overrides=overrides)
    errors = [case.mean_error(case.folded, case.plan)]
    for correct in (correct_bias, correct_bias_sequentially):
        errors.append(case.mean_error(*correct(*case.given, layers=case.names)[:2]))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.2 * errors[1]


def test_a_prefix_with_float_activations_leaves_their_error_alone(relu_chain, planned):
    settings = SequentialBiasSettings(include_activations=False)
    case = planned(*relu_chain, bits_weights=4, bits_activations=4)
    folded, plan, _ = correct_bias_sequentially(*case.given, layers=case.names, settings=settings)
    floats = planned(*relu_chain, bits_weights=4, bits_activations=0)
    expected, _, _ = correct_bias_sequentially(*floats.given, layers=case.names)
    with_grids, _, _ = correct_bias_sequentially(*case.given, layers=case.names)
    for name, bias in _biases(folded).items():
        assert torch.allclose(bias, _biases(expected)[name], atol=1e-5)
        assert name == "0" or not torch.allclose(bias, _biases(with_grids)[name], atol=1e-3)
    assert plan.layers["2"].output is case.plan.layers["2"].output


@pytest.mark.parametrize("correct", PASSES.values(), ids=PASSES)
def test_batches_of_another_size_give_the_same_biases(correct, tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches, bits_weights=4)
    x = torch.cat(tiny_batches)
    found = []
    for size in (1, 5, 12):
        found.append(_biases(correct(*case.given[:3], x.split(size), layers=case.names)[0]))
    for other in found[1:]:
        for name, bias in other.items():
            assert torch.allclose(bias, found[0][name], atol=1e-5), name


@pytest.mark.parametrize("bits", [0, 8])
def test_a_layer_without_a_bias_gets_one(bits, tiny_batches, planned):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    net[0].weight.data = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    case = planned(net, tiny_batches, bits_weights=2, bits_activations=bits)
    layer = correct_bias(*case.given, layers=["0"])[1].layers["0"]
    assert case.plan.layers["0"].bias_q is None and case.plan.layers["0"].bias is None
    assert int(((layer.bias if bits == 0 else layer.bias_q) != 0).sum()) >= 3


def test_only_the_layers_that_are_named_change(tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches, bits_weights=4)
    _, plan, report = correct_bias_sequentially(*case.given, layers=["depthwise"])
    assert [change.name for change in report.changed] == ["depthwise"]
    assert [name for name in plan.layers if plan.layers[name] is not case.plan.layers[name]] == ["depthwise"]


def test_channels_that_are_too_far_off_keep_their_bias_and_it_is_said(tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches)
    layer = case.plan.layers["fc"]
    wrong = layer.weight_q.clone()
    wrong[3] = 255 * (torch.arange(wrong.shape[1]) % 2)
    wrong[3, :100] = 255
    broken = replace(case.plan, layers={**case.plan.layers, "fc": replace(layer, weight_q=wrong)})
    folded, _, report = correct_bias(case.reference, case.folded, broken, case.batches, layers=["fc"])
    same = _biases(folded)["fc"] == _biases(case.folded)["fc"]
    assert same.nonzero().flatten().tolist() == [3]
    expected = "of 10 channels, kept the bias of 1 off by more than 2 standard deviations"
    assert report.changed[0].note == expected
    settings = FastBiasSettings(max_shift=1e-6)
    _, plan, report = correct_bias(*case.given, layers=["fc"], settings=settings)
    assert plan.layers["fc"] is layer
    assert report.left == {
        "fc": "of 10 channels, kept the bias of 10 off by more than 1e-06 standard deviations"
    }


def test_a_bias_that_would_saturate_the_accumulator_is_not_given(tiny_net, tiny_batches, planned):
    case = planned(tiny_net, tiny_batches, bits_weights=4, bits_accum=12)
    layer = case.plan.layers["fc"]
    assert int(layer.bias_q.abs().max()) < 2047
    case.folded.traced.get_submodule("fc").bias.data[0] = 2100 * float(layer.accum_scale)
    _, plan, report = correct_bias(*case.given, layers=["fc"], settings=FastBiasSettings(max_shift=1e3))
    assert report.changed[0].note == "of 10 channels, kept the bias of 1 whose bias would saturate 12 bits"
    assert plan.layers["fc"].bias_q[0] == 2047
    assert not torch.equal(plan.layers["fc"].bias_q[1:], layer.bias_q[1:])


def test_channels_without_weights_keep_their_bias_by_wider_steps(tiny_net, tiny_batches, planned):
    """A channel with weights of 1e-14 had steps of 1e-18, in which 32 bits hold no bias of 2."""
    tiny_net.fc.weight.data[3] *= 1e-13
    tiny_net.fc.bias.data[3] = 1e-13
    case = planned(tiny_net, tiny_batches, per_channel_weights=True)
    case.folded.traced.get_submodule("fc").bias.data[3] = 2.0  # as another correction may leave it
    layer, scale = case.plan.layers["fc"], case.plan.layers["fc"].accum_scale[3]
    bias_q = torch.where(torch.arange(10) == 3, min(2 / float(scale), 2**31 - 1), layer.bias_q).long()
    layers = {**case.plan.layers, "fc": replace(layer, bias_q=bias_q)}
    case.plan = replace(case.plan, layers=layers)
    outputs = [build(case.folded, case.plan)(tiny_batches[0])[:, 3]]
    folded, plan, report = correct_bias(*case.given, layers=["fc"])
    outputs.append(build(folded, plan)(tiny_batches[0])[:, 3])
    errors = [float((y - 2).abs().max()) for y in outputs]
    assert errors[0] > 1.9 and errors[1] <= float(plan.layers["fc"].output.scale) / 2
    assert report.changed[0].note == "wider steps for 1 channels whose bias had saturated"
    same = plan.layers["fc"].weight.scale == case.plan.layers["fc"].weight.scale
    assert same.logical_not().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("settings", [{}, {"per_channel_weights": True}, {"scale_approx_bits": 3}], ids=str)
def test_the_effective_weight_is_what_the_quantized_layer_computes_with(settings, planned):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False))
    net[0].weight.data = torch.randn(4, 3, 3, 3, generator=generator)
    case = planned(net, [torch.randn(2, 4, 5, 5, generator=generator)], bits_weights=4, **settings)
    layer, quantized = case.plan.layers["0"], build(case.folded, case.plan).network
    x = quantize_centered(case.batches[0], layer.inputs[0])
    module = case.reference.get_submodule("0")
    weight = effective_weight(layer, module, layer.inputs[0])
    found = weighted_function(module)(x.double() * layer.inputs[0].scale, weight)
    steps = quantized.get_submodule("0").accumulate(x).double()
    expected = steps * along_axis(layer.accum_scale, 1, 4)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


class Residual(nn.Module):
    """Two residual blocks, the second with a layer on both ways, and a linear layer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))
        for conv in self.convs:
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator) / 6
            conv.bias.data = torch.randn(8, generator=generator) / 6
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(5))
        self.fc = nn.Linear(8, 4)
        self.fc.weight.data = torch.randn(4, 8, generator=generator)

    def forward(self, x):
        x = self.relus[0](self.convs[0](x))
        x = self.relus[1](x + self.convs[2](self.relus[2](self.convs[1](x))))
        x = self.relus[3](self.convs[4](self.relus[4](self.convs[3](x))) + self.convs[5](x))
        return self.fc(x.mean((2, 3)))


READ = ["relus.0", "relus.2", "relus.1", "relus.4", "relus.3"]


def _mean_errors(case, folded, plan, names):
    """How far the mean of layers' outputs is from that of the float network, by layer."""
    outputs = []
    for network in (case.reference, build(folded, plan).network):
        modules, found = dict(network.named_modules()), {}
        handles = []  # modules are shared by both networks
        for name in names:
            hook = lambda _m, _a, y, name=name, f=found: f.update({name: y})  # noqa: E731
            handles.append(modules[name].register_forward_hook(hook))
        with torch.no_grad():
            network(torch.cat(case.batches))
        for handle in handles:
            handle.remove()
        outputs.append(found)
    errors = {}
    for name in names:
        y, y_hat = (found[name].transpose(0, 1).flatten(1).mean(dim=1) for found in outputs)
        errors[name] = float((y_hat - y).norm() / y.norm())
    return errors


@pytest.mark.parametrize("at", ["activation", "output"])
def test_means_are_equal_where_they_are_asked_to_be(at, tiny_batches, planned):
    """With activations in float what a layer gives is what the correction aimed at."""
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    case = planned(Residual(), list(images.split(16)), bits_weights=3, bits_activations=0)
    settings = SequentialBiasSettings(at=at)
    folded, plan, report = correct_bias_sequentially(*case.given, layers=case.names, settings=settings)
    assert not report.left
    before = _mean_errors(case, case.folded, case.plan, READ)
    after = _mean_errors(case, folded, plan, READ)
    convs = _mean_errors(case, folded, plan, [f"convs.{i}" for i in range(6)])
    if at == "activation":
        assert all(after[name] < 1e-3 < before[name] / 5 for name in READ), (before, after)
        assert convs["convs.1"] > 1e-3
    else:
        assert max(after.values()) > 1e-2
        assert max(convs.values()) < 1e-3


def test_equal_means_where_values_are_read_serve_the_outputs_better(planned, logits_sqnr):
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    case = planned(Residual(), list(images.split(16)), bits_weights=3, bits_activations=4)
    found = [logits_sqnr(case.reference, case.folded, case.plan, case.batches)]
    for at in ("output", "activation"):
        settings = SequentialBiasSettings(at=at)
        folded, plan, _ = correct_bias_sequentially(*case.given, layers=case.names, settings=settings)
        found.append(logits_sqnr(case.reference, folded, plan, case.batches))
    assert found[2] > max(found[:2]) + 1


@pytest.mark.parametrize("made_up", [True, False])
def test_biases_stay_where_the_network_s_outputs_would_lose(made_up, planned):
    """The first layer gives too much; mending it is a gain unless the second one makes up for it."""
    generator = torch.Generator().manual_seed(8)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    batches = list(torch.randn(32, 6, generator=generator).split(8))
    reference = planned(copy.deepcopy(net), batches).reference
    shift = torch.randn(8, generator=generator)
    net[0].bias.data += shift
    if made_up:
        net[1].bias.data -= net[1].weight.detach() @ shift
    case = planned(net, batches)
    given = (reference, *case.given[1:])
    always, _, _ = correct_bias_sequentially(*given, layers=["0"])
    settings = SequentialBiasSettings(only_if_better=True)
    folded, plan, report = correct_bias_sequentially(*given, layers=["0"], settings=settings)
    assert torch.equal(_biases(folded)["0"], _biases(case.folded if made_up else always)["0"])
    assert (plan is case.plan) is made_up
    assert [change.name for change in report.changed] == ([] if made_up else ["0"])
    assert ("error of the network's outputs" in report.left.get("0", "")) is made_up


def test_networks_that_branch_by_values_are_left_alone(tiny_batches, planned):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    case = planned(Branches(), [*tiny_batches, *(-x for x in tiny_batches)])
    _, plan, report = correct_bias(*case.given, layers=["a"])
    assert plan is case.plan and list(report.left) == ["a"] and "branches" in report.left["a"]


def test_guard_and_settings_refuse_what_makes_no_sense(tiny_net, tiny_batches, planned):
    shift, refused = guarded(torch.tensor([0.0, 1.0, -3.0]), torch.tensor([0.0, 0.5, 1.0]), 2.0)
    assert (shift.tolist(), refused.tolist()) == ([0, 1, 0], [False, False, True])
    with pytest.raises(ValueError, match="max_shift must be positive, found 0"):
        FastBiasSettings(max_shift=0)
    with pytest.raises(ValueError, match="at must be activation or output, found 'input'"):
        SequentialBiasSettings(at="input")
    case = planned(tiny_net, tiny_batches)
    with pytest.raises(ValueError, match="found no batches"):
        correct_bias(*case.given[:3], [], layers=["fc"])
