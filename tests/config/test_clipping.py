"""Clip modes: settings that do not fit together are refused, those that do reach the core."""

import pytest

from qtool.config import QuantizeConfig, check
from qtool.config.layers import layer_specs
from qtool.config.searches import with_settings_of_layers, without_weight_clipping
from qtool.errors import ConfigError
from qtool.numerics.spec import CLIP_MODES, LIVE_CLIP_MODES, SETTING_OF_MODE, ClipSpec

NAMES = ["conv1", "fc"]
OF_CALIBRATION = [mode for mode in CLIP_MODES if mode not in LIVE_CLIP_MODES]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"clip_percentile": 99.0, "clip_activations": "mse"},
            "--qe-clip-percentile: has no effect with clip mode mse; add '--qe-clip-acts percentile', or",
        ),
        (
            {"clip_outlier_prob": 0.01},
            "--qe-clip-outlier-prob: has no effect with clip mode none; add '--qe-clip-acts quantile', or",
        ),
        (
            {"clip_percentile_weights": 99.0, "clip_activations": "percentile"},
            "--qe-clip-percentile-wts: has no effect with clip mode none; add '--qe-clip-wts percentile', or",
        ),
        (
            {"clip_activations": "percentile", "overrides": {"fc": {"clip_outlier_prob": 0.1}}},
            "overrides.fc: --qe-clip-outlier-prob: has no effect with clip mode percentile; add",
        ),
        (
            {"clip_weights": "mse", "bits_weights": 0},
            "--qe-clip-wts: has no effect with --qe-bits-wts 0; leave that out, or leave it out",
        ),
        (
            {"clip_weights": "mse", "also_clip_weights": True},
            "--qe-clip-wts: also_clip_weights chooses the same ranges; drop one",
        ),
        (
            {"clip_weights": "mse", "overrides": {"fc": {"weight_range_factors": (0.5, 0.5)}}},
            "overrides.fc: weight_range_factors: --qe-clip-wts chooses the same ranges; drop one",
        ),
        (
            {"overrides": {"fc": {"weight_range_factors": (0.5, 0.5)}}, "clip_activations": "mse"}
            | {"also_clip_weights": True},
            "overrides.fc: weight_range_factors: also_clip_weights chooses the same ranges; drop one",
        ),
        *[
            (
                {"clip_activations": mode, "dynamic": True},
                f"--qe-clip-acts {mode}: reads what calibration measured, and --qe-dynamic does without;",
            )
            for mode in OF_CALIBRATION
        ],
        *[
            (
                {"clip_activations": mode, "also_clip_weights": True},
                f"also_clip_weights: clip mode {mode} is of activations only; leave it out, or give",
            )
            for mode in OF_CALIBRATION
        ],
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        check(QuantizeConfig(**settings))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_percentile": 99.0, "overrides": {"fc": {"clip_activations": "percentile"}}},
        {
            "clip_percentile": 99.0,
            "overrides": {"fc": {"input_overrides": {0: {"clip_activations": "percentile"}}}},
        },
        {"clip_weights": "mse", "bits_weights": 0, "overrides": {"fc": {"bits_weights": 4}}},
        {
            "clip_weights": "mse",
            "overrides": {"fc": {"weight_range_factors": (0.5, 0.5), "clip_weights": "none"}},
        },
        *[{"clip_activations": mode, "dynamic": True, "clip_n_stds": None} for mode in ("mse", "percentile")],
        *[{"clip_activations": mode, "bits_activations": 16} for mode in OF_CALIBRATION],
    ],
)
def test_settings_that_fit_together_pass(settings):
    check(QuantizeConfig(**settings))


@pytest.mark.parametrize(("mode", "setting"), SETTING_OF_MODE.items())
def test_a_setting_reaches_the_clip_mode_that_reads_it(mode, setting):
    config = QuantizeConfig(clip_activations=mode, **{f"clip_{setting}": 0.25})
    check(config)
    assert layer_specs(config, NAMES)["fc"].clip == ClipSpec(mode, **{setting: 0.25})


def test_settings_that_are_not_given_have_the_published_defaults():
    spec = layer_specs(QuantizeConfig(clip_activations="percentile", clip_weights="percentile"), NAMES)["fc"]
    assert (spec.clip.percentile, spec.clip.outlier_prob) == (99.99, 1e-4)
    assert spec.weight_clip == ClipSpec("percentile", percentile=99.99)


def test_weights_and_activations_are_clipped_each_in_their_way():
    config = QuantizeConfig(
        clip_activations="percentile",
        clip_percentile=99.0,
        clip_weights="percentile",
        clip_percentile_weights=99.9,
        overrides={"fc": {"clip_weights": "mse", "clip_percentile": 98.0}},
    )
    check(config)
    specs = layer_specs(config, NAMES)
    assert [s.clip.percentile for s in specs.values()] == [99.0, 98.0]
    assert [s.weight_clip.mode for s in specs.values()] == ["percentile", "mse"]
    assert specs["conv1"].weight_clip.percentile == 99.9


def test_an_input_has_clip_settings_of_its_own():
    own = {"clip_activations": "percentile", "clip_percentile": 90.0}
    config = QuantizeConfig(clip_activations="kl", overrides={"fc": {"input_overrides": {0: own}}})
    check(config)
    assert layer_specs(config, NAMES)["fc"].inputs[0].clip == ClipSpec("percentile", percentile=90.0)


def test_what_a_search_found_replaces_clip_modes_and_their_settings():
    asked = QuantizeConfig(
        clip_activations="percentile",
        clip_percentile=99.0,
        clip_weights="percentile",
        clip_percentile_weights=99.0,
        overrides={"fc": {"clip_activations": "quantile", "clip_outlier_prob": 0.1, "clip_weights": "mse"}},
    )
    found = with_settings_of_layers(asked, NAMES, {"conv1": {"clip_activations": "avg"}})
    check(found)
    specs = layer_specs(found, NAMES)
    assert [s.clip.mode for s in specs.values()] == ["avg", "none"]
    assert [s.weight_clip.mode for s in specs.values()] == ["percentile", "mse"]
    unclipped = without_weight_clipping(found)
    check(unclipped)
    assert [s.weight_clip for s in layer_specs(unclipped, NAMES).values()] == [None, None]
