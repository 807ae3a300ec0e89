"""Which settings hold for which layer, and which settings contradict each other."""

import pytest

from qtool.config import QuantizeConfig, check, layer_specs
from qtool.config.layers import matching, split_patterns
from qtool.errors import ConfigError
from qtool.numerics.spec import ClipSpec, LayerSpec, QuantSpec

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]


def weight_bits(config: QuantizeConfig) -> list[int | None]:
    return [s.weight.num_bits if s.weight else None for s in layer_specs(config, NAMES).values()]


def test_every_layer_gets_what_no_override_names():
    config = QuantizeConfig(
        mode="asym_s", mode_weights="sym_restr", bits_weights=4, per_channel_weights=True, bits_accum=24
    )
    expected = LayerSpec(
        weight=QuantSpec(4, narrow_range=True, axis=0), output=QuantSpec(8, symmetric=False), accum_bits=24
    )
    assert layer_specs(config, NAMES) == dict.fromkeys(NAMES, expected)


def test_first_override_that_matches_wins_whole():
    """E3: precedence, see test_a_name_wins_over_an_earlier_pattern too."""
    config = QuantizeConfig(
        overrides={"layer1.*": {"bits_weights": 4}, ".*conv1": {"bits_weights": 6, "mode": "asym_u"}}
    )
    assert weight_bits(config) == [6, 4, 4, 6, 8]
    assert layer_specs(config, NAMES)["layer1.0.conv1"].weight.mode == "sym"


def test_a_name_wins_over_an_earlier_pattern():
    config = QuantizeConfig(overrides={".*": {"bits_weights": 4}, "fc": {"bits_weights": 6}})
    assert weight_bits(config) == [4, 4, 4, 4, 6]


def test_pattern_matches_the_whole_name():
    """E3: alternatives escaped the anchors."""
    assert weight_bits(QuantizeConfig(overrides={"conv1": {"bits_weights": 4}})) == [4, 8, 8, 8, 8]
    assert weight_bits(QuantizeConfig(overrides={"con|fc": {"bits_weights": 4}})) == [8, 8, 8, 8, 4]


def test_groups_of_one_pattern_do_not_disturb_the_next():
    """E3: groups shifted the number of the pattern."""
    config = QuantizeConfig(overrides={"(con)(v)1": {"bits_weights": 3}, "fc": {"bits_weights": 4}})
    assert weight_bits(config) == [3, 8, 8, 8, 4]


def test_bits_of_zero_stay_in_float():
    config = QuantizeConfig(overrides={"fc": {"bits_weights": 0, "bits_activations": 0}})
    specs = layer_specs(config, NAMES)
    assert (specs["fc"].weight, specs["fc"].output) == (None, None)
    assert specs["conv1"].weight == QuantSpec(8)


def test_no_clip_wins_over_an_override():
    config = QuantizeConfig(
        clip_activations="gauss", overrides={"fc": {"clip_activations": "avg"}}, no_clip_layers=("fc,conv1",)
    )
    clips = [s.clip.mode for s in layer_specs(config, NAMES).values()]
    assert clips == ["none", "gauss", "gauss", "gauss", "none"]


def test_no_quant_wins_over_no_clip_and_overrides():
    config = QuantizeConfig(
        overrides={"fc": {"bits_weights": 4}}, no_clip_layers=("fc",), no_quant_layers=("fc", "conv1")
    )
    specs = layer_specs(config, NAMES)
    assert (specs["fc"].weight, specs["fc"].output, specs["fc"].clip) == (None, None, ClipSpec())
    assert weight_bits(config) == [None, 8, 8, 8, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["fc,conv1"], ["fc", "conv1"]),
        (["fc", " conv1 , "], ["fc", "conv1"]),
        (["a{1,2},b"], ["a{1,2}", "b"]),
        (["layer[1,2].*"], ["layer[1,2].*"]),
        ([], []),
    ],
)
def test_patterns_are_separated_by_commas_outside_braces_and_brackets(values, expected):
    assert split_patterns(values) == expected


def test_name_that_is_no_valid_expression_matches_itself():
    assert matching("layer[0", ["layer[0", "fc"]) == ["layer[0"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("conv_1", "pattern 'conv_1': matches no layer; did you mean 'conv1'"),
        ("onv1", "pattern 'onv1': matches no layer; did you mean 'conv1'"),
        ("zzz", "pattern 'zzz': matches no layer; 'qtool layers' lists their names"),
        ("(", "pattern '(': not a regular expression: "),
        (
            "a{99999999999}",
            "pattern 'a{99999999999}': not a regular expression: the repetition number is too",
        ),
    ],
)
def test_pattern_without_match_is_refused_with_the_nearest_names(pattern, message):
    """E2: patterns without a match were ignored."""
    with pytest.raises(ConfigError) as caught:
        matching(pattern, NAMES)
    assert str(caught.value).startswith(message)


def test_all_patterns_without_match_are_reported_together():
    config = QuantizeConfig(
        overrides={"cv": {}}, no_clip_layers=("conv1,clipped",), no_quant_layers=("floating",)
    )
    with pytest.raises(ConfigError) as caught:
        layer_specs(config, NAMES)
    found = [line.split(": matches")[0] for line in str(caught.value).splitlines()]
    assert found == [
        "overrides: pattern 'cv'",
        "--qe-no-clip-layers: pattern 'clipped'",
        "--qe-no-quant-layers: pattern 'floating'",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_activations": "n_std"}, "--qe-clip-acts n_std: needs --qe-clip-n-stds, such as 3"),
        (
            {"clip_n_stds": 2.0},
            "--qe-clip-n-stds: has no effect with clip mode none; add '--qe-clip-acts n_std'",
        ),
        (
            {"clip_activations": "laplace", "bits_activations": 9},
            "--qe-clip-acts laplace: has published constants for up to 8 bits, found 9; choose another",
        ),
        (
            {"bits_accum": 8, "bits_weights": 9},
            "--qe-bits-accum: 8 bits are fewer than the 9 of the values added up",
        ),
        (
            {"overrides": {"fc": {"clip_activations": "n_std"}}},
            "overrides.fc: --qe-clip-acts n_std: needs --qe-clip-n-stds",
        ),
        (
            {"clip_activations": "gauss", "overrides": {"fc": {"bits_activations": 16}}},
            "overrides.fc: --qe-clip-acts gauss: has published constants for up to 8 bits, found 16",
        ),
        (
            {"scale_approx_everywhere": True},
            "--qe-scale-approx-everywhere: has no effect on exact scales; add --qe-scale-approx-bits",
        ),
        (
            {
                "scale_approx_bits": 8,
                "overrides": {"fc": {"scale_approx_bits": None, "scale_approx_everywhere": True}},
            },
            "overrides.fc: --qe-scale-approx-everywhere: has no effect",
        ),
        (
            {"mode_activations": "asym_u", "symmetric_unsigned": True},
            "--qe-sym-unsigned: has no effect on asymmetric or float activations; choose mode sym",
        ),
        (
            {"overrides": {"fc": {"bits_activations": 0, "input_overrides": {0: {"from_output": True}}}}},
            "overrides.fc.input_overrides.0: has no effect, because bits_activations is 0 (null)",
        ),
        (
            {"bits_activations": 0, "overrides": {"fc": {"input_overrides": {1: {"bits_activations": 4}}}}},
            "overrides.fc.input_overrides.1: has no effect, because bits_activations is 0 (null)",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        check(QuantizeConfig(**settings))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_activations": "n_std", "clip_n_stds": 2.0},
        {"clip_n_stds": 2.0, "overrides": {"fc": {"clip_activations": "n_std"}}},
        {"clip_activations": "laplace", "bits_activations": 8, "bits_weights": 16},
        {"bits_accum": 8},
        {"scale_approx_everywhere": True, "overrides": {"fc": {"scale_approx_bits": 8}}},
        {"mode": "asym_u", "symmetric_unsigned": True, "overrides": {"fc": {"mode_activations": "sym"}}},
        {"clip_to_observed": True},  # a search may have found that nothing is clipped
    ],
)
def test_settings_that_fit_together_pass(settings):
    check(QuantizeConfig(**settings))


@pytest.mark.parametrize("key", ["clip_to_observed", "symmetric_unsigned", "scale_approx_everywhere"])
def test_a_switch_of_all_layers_can_be_turned_off_for_one(key):
    """D9, D10, D13: for all layers, and by override."""
    config = QuantizeConfig(**{key: True}, scale_approx_bits=8, overrides={"fc": {key: False}})
    specs = layer_specs(config, ["conv1", "fc"])
    found = {
        name: spec.clip.to_observed if key == "clip_to_observed" else getattr(spec, key)
        for name, spec in specs.items()
    }
    assert found == {"conv1": True, "fc": False}


def test_d9_clipping_of_weights_and_of_one_input_stay_within_the_observed_values_too():
    inputs = {0: {"clip_activations": "gauss"}, 1: {"clip_activations": "gauss", "clip_to_observed": False}}
    config = QuantizeConfig(
        clip_activations="laplace",
        clip_to_observed=True,
        also_clip_weights=True,
        overrides={"add": {"input_overrides": inputs}},
    )
    spec = layer_specs(config, ["add"])["add"]
    assert spec.weight_clip == ClipSpec("laplace", to_observed=True)
    assert spec.inputs[0].clip == ClipSpec("gauss", to_observed=True)
    assert spec.inputs[1].clip == ClipSpec("gauss")


def test_d16_module_is_part_of_a_name_unless_it_comes_first():
    """Distiller took "module." out of the middle of a name, so that no pattern matched it."""
    names = ["submodule.conv", "module.fc", "subconv"]
    assert matching("submodule.conv", names) == matching(r"submodule\..*", names) == ["submodule.conv"]
    config = QuantizeConfig(overrides={"subconv": {"bits_weights": 4}})
    assert layer_specs(config, names)["submodule.conv"].weight.num_bits == 8
