"""Settings with other bits."""

import pytest

from qtool.config import QuantizeConfig, check, layer_specs, with_bits, with_bits_of_layers

NAMES = ["conv1", "conv2", "relu", "fc"]


def bits_of(config: QuantizeConfig) -> dict[str, tuple[int, int]]:
    specs = layer_specs(config, NAMES)
    return {
        name: (spec.weight.num_bits if spec.weight else 0, spec.output.num_bits if spec.output else 0)
        for name, spec in specs.items()
    }


def test_bits_hold_in_overrides_too_and_float_stays_float():
    own = {"conv.*": {"bits_weights": 6}, "fc": {"bits_weights": 0, "bits_activations": 7}}
    config = with_bits(QuantizeConfig(first_last_bits=8, overrides=own, no_quant_layers=("relu",)), 4, 5)
    assert config.first_last_bits is None
    assert bits_of(config) == {"conv1": (4, 5), "conv2": (4, 5), "relu": (0, 0), "fc": (0, 5)}


def test_bits_of_one_kind_leave_the_other():
    config = with_bits(QuantizeConfig(first_last_bits=8), weights=3)
    assert bits_of(config)["fc"] == (3, 8) and config.first_last_bits == 8


def test_bits_of_inputs_follow():
    own = {"fc": {"input_overrides": {0: {"bits_activations": 6, "mode": "sym"}}}}
    specs = layer_specs(with_bits(QuantizeConfig(overrides=own), activations=4), NAMES)
    assert specs["fc"].inputs[0].grid.num_bits == 4


def test_the_bits_of_single_layers_win_over_expressions_and_keep_what_these_say():
    config = QuantizeConfig(overrides={"conv.*": {"mode": "asym_u", "bits_weights": 6}})
    found = with_bits_of_layers(config, NAMES, {"conv2": {"bits_weights": 2}, "fc": {"bits_activations": 0}})
    assert bits_of(found) == {"conv1": (6, 8), "conv2": (2, 8), "relu": (8, 8), "fc": (8, 0)}
    assert layer_specs(found, NAMES)["conv2"].output.mode == "asym_u"


@pytest.mark.parametrize(
    "setting", [{"output_range": (-1.0, 1.0)}, {"input_overrides": {0: {"mode": "sym"}}}]
)
def test_a_layer_that_is_left_in_float_loses_what_only_a_grid_has(setting):
    config = QuantizeConfig(overrides={"fc": setting})
    found = with_bits_of_layers(config, NAMES, {"fc": {"bits_weights": 0, "bits_activations": 0}})
    check(found)
    assert bits_of(found)["fc"] == (0, 0)
