"""Which layers and tensors of a file are looked at."""

import pytest

from qtool.errors import ConfigError
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats
from qtool.pipeline.stats_records import of_layers, produced, values

NET = ModelStats({name: LayerStats({}, ActivationStats(0, 1)) for name in ("conv1", "layer1.0", "fc")}, "a")
OTHER = ModelStats({"conv2": LayerStats()}, "b")


def test_patterns_choose_layers_in_the_order_of_the_file():
    (chosen,) = of_layers(["fc,layer1\\..*"], NET)
    assert list(chosen.layers) == ["layer1.0", "fc"]
    assert of_layers([], NET) == [NET]


def test_pattern_may_match_in_one_file_only():
    a, b = of_layers(["conv.*"], NET, OTHER)
    assert (list(a.layers), list(b.layers)) == (["conv1"], ["conv2"])
    assert [list(s.layers) for s in of_layers(["conv2"], NET, OTHER)] == [[], ["conv2"]]


def test_pattern_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(
        ConfigError, match=r"--layer: pattern 'conv_1': matches no layer; did you mean 'conv1'"
    ):
        of_layers(["conv_1"], NET)
    with pytest.raises(ConfigError, match=r"--layer: pattern '\(': not a regular expression"):
        of_layers(["("], NET)


def test_an_input_in_another_shape_is_still_what_a_layer_produced():
    stats = ModelStats({"relu": LayerStats({}, ActivationStats(0, 2, mean=1, shape=(1, 2, 3)))})
    assert values(ActivationStats(0, 2, mean=1, shape=(1, 6))) in produced(stats)
    assert values(ActivationStats(0, 2, mean=1.5, shape=(1, 6))) not in produced(stats)
