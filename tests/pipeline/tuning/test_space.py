"""What may be tuned, and the settings that a candidate stands for."""

from dataclasses import replace

import pytest

import qtool
from qtool.config import Config, CorrectionsConfig, QuantizeConfig, TuningConfig, check
from qtool.errors import ConfigError
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.pipeline.tuning.space import TuningSpace, check_space, config_of, tuning_space
from qtool.quantizers.plan import plan_model
from qtool.search.space import Candidate


@pytest.fixture
def opened(tiny_net, tiny_batches):
    """The space of a config on tiny_net, and what would be asked of its layers for a candidate."""
    traced = trace(tiny_net, tiny_batches[0])
    folded = fold_batch_norms(traced)
    stats = move_stats(qtool.calibrate(tiny_net, tiny_batches), folded.pairs)

    def space_of(config: Config) -> TuningSpace:
        plan = plan_model(folded.traced, stats, specs_for(traced, config.quantizers))
        return tuning_space(config, traced, folded.traced, plan)

    def specs_of(config: Config, candidate: Candidate):
        made = config_of(config, candidate, space_of(config)).quantizers
        check(made)
        return specs_for(traced, made)

    return space_of, specs_of


def options_of(space: TuningSpace) -> dict[str, tuple]:
    return {d.name: d.options for d in space.space.dimensions}


def test_the_space_starts_where_the_settings_are(opened):
    space_of, _ = opened
    config = Config(quantizers=QuantizeConfig(mode="sym_restr", clip_activations="avg"))
    space = space_of(config)
    assert options_of(space) == {
        "mode_activations": ("sym_restr", "asym_u", "sym"),
        "clip_activations": ("avg", "mse", "kl"),
        "mode_weights": ("sym_restr", "sym"),
        "clip_weights": ("none", "mse"),
        "per_channel_weights": (False, True),
        "ends": (None, 0),
        "preset": ("none", "fast", "accurate"),
    }
    assert space.space.fallback == (0,) and space.ends == ("conv1", "fc")


def test_at_few_bits_ends_and_groups_get_eight_before_float(opened):
    space_of, _ = opened
    space = space_of(Config(quantizers=QuantizeConfig(bits_weights=4)))
    assert options_of(space)["ends"] == (None, 8) and space.space.fallback == (8, 0)


def test_what_is_named_alone_is_tuned(opened):
    space_of, _ = opened
    space = space_of(
        Config(tuning=TuningConfig(tuned=("granularity", "groups"), fallback_bits=("16", "float")))
    )
    assert options_of(space) == {"per_channel_weights": (False, True)}
    assert space.space.fallback == (16, 0) and space.space.groups
    assert not space_of(Config(tuning=TuningConfig(tuned=("modes",)))).space.groups


def test_corrections_that_are_named_stay(opened):
    space_of, _ = opened
    config = Config(corrections=CorrectionsConfig(methods=("bias_correction",)))
    assert "preset" not in options_of(space_of(config))
    assert config_of(config, space_of(config).space.start, space_of(config)).corrections == config.corrections


def test_the_start_is_what_was_asked_for(opened, tiny_net, tiny_batches):
    space_of, specs_of = opened
    config = Config(quantizers=QuantizeConfig(mode="asym_u", overrides={"fc": {"bits_weights": 4}}))
    asked = specs_for(trace(tiny_net, tiny_batches[0]), config.quantizers)
    assert specs_of(config, space_of(config).space.start) == asked


def test_settings_reach_every_layer(opened):
    space_of, specs_of = opened
    config = Config(quantizers=QuantizeConfig(clip_activations="percentile", clip_percentile=99.0))
    start = space_of(config).space.start
    specs = specs_of(
        config, start.with_setting("clip_activations", "mse").with_setting("per_channel_weights", True)
    )
    assert all(s.clip.mode == "mse" for s in specs.values()) and specs["conv1"].weight.axis == 0


def test_a_group_in_float_leaves_its_layers_so_and_no_others(opened):
    space_of, specs_of = opened
    config = Config()
    space = space_of(config)
    group = space.space.groups[0]
    specs = specs_of(config, space.space.start.with_raised(group, bits=0))
    in_float = {n for n, s in specs.items() if s.weight is None and s.output is None}
    assert in_float == set(space.groups[group])


def test_a_group_with_more_bits_keeps_its_other_settings(opened):
    space_of, specs_of = opened
    quantizers = QuantizeConfig(bits_weights=4, bits_activations=6, overrides={"conv.*": {"mode": "asym_u"}})
    config = Config(quantizers=quantizers)
    space = space_of(config)
    specs = specs_of(config, Candidate.of({}, {"conv1": 8}))
    assert "conv1" in space.groups
    assert specs["conv1"].weight.num_bits == specs["conv1"].output.num_bits == 8
    assert not specs["conv1"].weight.symmetric and specs["fc"].weight.num_bits == 4


def test_more_bits_never_take_any(opened):
    _, specs_of = opened
    config = Config(quantizers=QuantizeConfig(bits_weights=4, bits_activations=16))
    specs = specs_of(config, Candidate.of({}, {"conv1": 8}))
    assert specs["conv1"].weight.num_bits == 8 and specs["conv1"].output.num_bits == 16


@pytest.mark.parametrize(("ends", "bits"), [(8, 8), (0, None), (None, 4)])
def test_both_ends_can_have_more(opened, ends, bits):
    _, specs_of = opened
    config = Config(quantizers=QuantizeConfig(bits_weights=4))
    specs = specs_of(config, Candidate.of({"ends": ends}))
    for name in ("conv1", "fc"):
        weight = specs[name].weight
        assert (None if weight is None else weight.num_bits) == bits
    assert specs["depthwise"].weight.num_bits == 4


def test_a_preset_is_a_setting_of_corrections(opened):
    space_of, _ = opened
    made = config_of(Config(), Candidate.of({"preset": "accurate"}), space_of(Config()))
    assert made.corrections.preset == "accurate" and made.tuning == TuningConfig()


@pytest.mark.parametrize(
    ("quantizers", "tuning", "message"),
    [
        ({"bits_weights": 0, "bits_activations": 0}, {}, "leave nothing to be tuned"),
        ({"per_channel_weights": True}, {"tuned": ("granularity",)}, "leaves nothing to be tuned here"),
        ({}, {"fallback_bits": ("8",)}, "--fallback 8: weights and activations have 8 bits"),
        ({}, {"tuned": ("modes",), "fallback_bits": ("float",)}, "--fallback: is of single groups"),
    ],
)
def test_nothing_to_tune_is_found_early(quantizers, tuning, message):
    config = replace(Config(), quantizers=QuantizeConfig(**quantizers), tuning=TuningConfig(**tuning))
    with pytest.raises(ConfigError, match=message):
        check_space(config)
