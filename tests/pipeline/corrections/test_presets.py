"""What presets choose for which network and bits."""

import pytest
import torch
import torchvision
from torch import nn

from qtool.config import CorrectionsConfig, QuantizeConfig
from qtool.graph.trace import trace
from qtool.pipeline import steps
from qtool.pipeline.corrections import decide
from qtool.pipeline.corrections.presets import traits_of


def _decide(traced, preset, **settings):
    return decide(traced, QuantizeConfig(mode="asym_u", **settings), CorrectionsConfig(preset=preset))


@pytest.fixture
def traced(tiny_net, tiny_batches):
    return trace(tiny_net, tiny_batches[0])


def test_none_changes_nothing(traced):
    found = _decide(traced, "none")
    assert found.methods == () and found.quantizers == QuantizeConfig(mode="asym_u")


def test_chosen_estimators_stay(traced):
    found = _decide(traced, "fast", clip_activations="avg", clip_weights="percentile").quantizers
    assert (found.clip_activations, found.clip_weights) == ("avg", "percentile")


def test_bits_modes_and_granularity_stay(traced):
    found = _decide(traced, "best", bits_weights=4, bits_activations=6).quantizers
    assert (found.mode, found.bits_weights, found.bits_activations) == ("asym_u", 4, 6)
    assert not found.per_channel_weights


def test_each_preset_does_more_than_the_one_before(traced):
    def names(preset):
        return [c.name for c in _decide(traced, preset, bits_weights=4).methods]

    assert names("fast") == ["fast_bias_correction"]
    assert names("accurate") == ["weight_correction", "bias_correction"]
    assert names("best") == ["gptq", "bias_correction"]


@pytest.mark.parametrize(("bits", "tried"), [(8, False), (6, False), (5, True), (4, True)])
def test_behind_gptq_with_few_bits_of_activations_biases_change_only_if_that_serves(traced, bits, tried):
    found = _decide(traced, "best", bits_activations=bits)
    assert found.methods[-1].settings.only_if_better is tried
    assert any("unless" in line for line in found.words) is tried


@pytest.mark.parametrize(
    ("wts", "acts", "searched"), [(4, 8, True), (8, 8, False), (4, 4, False), (4, 0, True)]
)
def test_scales_are_searched_where_weights_have_fewer_bits_than_activations(traced, wts, acts, searched):
    found = _decide(traced, "best", bits_weights=wts, bits_activations=acts)
    (gptq,) = (c for c in found.methods if c.name == "gptq")
    assert gptq.settings.search_scales is searched
    assert any("with their scales" in line for line in found.words) is searched


@pytest.mark.parametrize(
    ("per_channel", "words"), [(True, "scales"), (False, "scales where each channel has one")]
)
def test_scales_of_weights_with_one_grid_are_not_promised(traced, per_channel, words):
    found = _decide(traced, "best", bits_weights=4, per_channel_weights=per_channel)
    (line,) = (line for line in found.words if line.startswith("GPTQ"))
    assert line.endswith(words)


def test_weights_in_float_need_no_correction(traced):
    assert _decide(traced, "best", bits_weights=0).methods == ()


def test_equalization_is_for_one_grid_per_tensor(linked_net, tiny_batches):
    traced = trace(linked_net, tiny_batches[0])
    of_tensors = _decide(traced, "fast")
    of_channels = _decide(traced, "fast", per_channel_weights=True)
    assert "equalization" in {c.name for c in of_tensors.methods}
    assert "equalization" not in {c.name for c in of_channels.methods}


def test_a_transformer_gets_no_equalization():
    net = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32).eval()
    traced = trace(net, steps.example_input((3, 32, 32)))
    assert traits_of(traced, steps.specs_for(traced, QuantizeConfig())).attention
    found = _decide(traced, "best")
    assert "equalization" not in {c.name for c in found.methods}
    assert any("attention" in line for line in found.words)


def test_named_methods_come_in_place_of_the_preset_s(traced):
    asked = CorrectionsConfig(preset="best", methods=("bias_correction",))
    found = decide(traced, QuantizeConfig(mode="asym_u"), asked)
    assert [c.name for c in found.methods] == ["bias_correction"]
    assert found.quantizers.clip_activations == "auto"


@pytest.mark.parametrize(("bits", "expected"), [(8, "sum"), (6, "sum"), (5, "fused"), (4, "fused")])
def test_with_few_bits_what_is_added_up_is_not_rounded_before(traced, bits, expected):
    for preset in ("fast", "accurate"):
        assert _decide(traced, preset, bits_activations=bits).quantizers.add_rounding == expected
    assert _decide(traced, "best", bits_activations=bits).quantizers.add_rounding == "fused"


@pytest.mark.parametrize(
    ("asked", "words"), [("none", "sums are not rounded"), ("inputs", "each summand is rounded at the scale")]
)
def test_how_sums_are_rounded_stays_where_it_was_chosen(traced, asked, words):
    found = _decide(traced, "best", add_rounding=asked)
    assert found.quantizers.add_rounding == asked
    assert any(words in line for line in found.words)


@pytest.mark.parametrize(("asked", "chosen"), [(None, "input"), ("input", "input"), ("own", "own")])
def test_max_pools_hand_on_their_input_s_grid_unless_they_are_to_have_their_own(asked, chosen):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    traced = trace(net.eval(), torch.zeros(1, 3, 8, 8))
    found = _decide(traced, "fast", max_pool_grid=asked)
    assert found.quantizers.max_pool_grid == chosen
    assert any("max pools" in line for line in found.words) == (chosen == "input")
