"""The schemas accept and refuse what the loaders do, so editors say what a run would say."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from qtool.config import SECTIONS, Config, dump_config, load_config, options_of
from qtool.config.distiller import QUANTIZER_CLASS
from qtool.config.gate import load_gate
from qtool.config.schema import SCHEMAS, schema_text
from qtool.config.sections import INPUT_SETTINGS, OVERRIDABLE
from qtool.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Every kind of value that may stand in the wrong place; -1 and 10**9 are beyond most limits.
VALUES = [
    None,
    True,
    0,
    1,
    5,
    -1,
    10**9,
    0.5,
    -0.5,
    "zzz",
    "asym_u",
    [],
    [1],
    [1, 2],
    [1, 2, 3],
    ["a"],
    {"a": 1},
]
QUANTIZER = {
    "overrides": {
        "conv1": {"bits_weights": 4, "output_range": [0, 1]},
        "fc": {"fake": True, "input_overrides": {0: {"from_output": True}, 1: {"mode": "sym"}}},
        "layer1.*": {"mode": {"activations": "sym", "weights": "asym_s"}},
    },
    "no_clip_layers": ["fc"],
}
DISTILLERS = {
    "post_train_quantizer": {
        "class": QUANTIZER_CLASS,
        "bits_activations": 6,
        "bits_parameters": None,
        "mode": {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
        "model_activation_stats": "stats.yaml",
        "per_channel_wts": True,
        "clip_acts": "AVG",
        "inputs_quant_auto_fallback": False,
        "overrides": {
            "conv1": {"fp16": True, "bits_bias": None, "clip_acts": "NONE"},
            "fc": {"input_overrides": {0: {"clip_acts": "AVG", "mode": "ASYMMETRIC_SIGNED"}}},
        },
    }
}
GATE = {
    "baseline": "b.json",
    "error_rate": 0.01,
    "runs": [
        {
            "name": "a",
            "quantizers": {"bits_weights": 4},
            "expect": {"top1_min": 98, "drop_max": "baseline + 0.5"},
        },
        {"name": "b", "judge": "point", "run": {"seed": 3}, "expect": {"agreement_min": "baseline"}},
    ],
}


def as_json(tree: Any) -> Any:
    """As an editor sees YAML: all keys are text."""
    if isinstance(tree, dict):
        return {str(key): as_json(value) for key, value in tree.items()}
    return [as_json(item) for item in tree] if isinstance(tree, list) else tree


def problems(name: str, tree: Any) -> list[str]:
    """What a shipped schema says of a tree."""
    schema = json.loads(SCHEMAS[name].path.read_text(encoding="utf-8"))
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(as_json(tree))]


@pytest.fixture
def loads(write_config):
    """Whether the loader takes a tree."""

    def loads(tree: Any, load=load_config) -> bool:
        try:
            load(write_config(yaml.safe_dump(tree)))
        except ConfigError:
            return False
        return True

    return loads


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_schema_is_current_and_valid(name):
    assert SCHEMAS[name].path.read_text(encoding="utf-8") == schema_text(name), "run 'make docs'"
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name].make())


def test_schemas_are_part_of_the_package():
    assert "config/*.json" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_of_configs_fits_the_schema_that_it_names(path):
    text = path.read_text(encoding="utf-8")
    (named,) = [line.split("$schema=")[1] for line in text.splitlines() if "$schema=" in line]
    (name,) = [name for name, kind in SCHEMAS.items() if (path.parent / named).resolve() == kind.path]
    assert not problems(name, yaml.safe_load(text))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_file_of_configs_with_an_unknown_key_does_not_fit(path):
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = "check" if "runs" in tree else "config"
    section = tree["runs"][0] if "runs" in tree else tree
    for changed in (tree, section, section["quantizers"]):
        changed["bits_wieghts"] = 8
        assert any("bits_wieghts" in problem for problem in problems(name, tree))
        del changed["bits_wieghts"]
    assert not problems(name, tree)


def test_resolved_config_of_a_run_fits():
    assert not problems("config", yaml.safe_load(dump_config(Config())))


@pytest.mark.parametrize("tree", [QUANTIZER, DISTILLERS])
def test_forms_of_a_quantizer_fit_as_they_load(tree, loads):
    assert loads({"quantizers": tree})
    assert not problems("config", {"quantizers": tree})


@pytest.mark.parametrize("section", SECTIONS)
def test_schema_and_loader_agree_on_every_option(section, loads):
    for name, _, described in options_of(SECTIONS[section]):
        for value in VALUES:
            tree = {section: {name: value}}
            assert bool(problems("config", tree)) != loads(tree), f"{name}: {value!r}, {described}"


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (("overrides", "conv1"), (*OVERRIDABLE, "stats_file", "bits_wts", "from_output")),
        (("overrides", "fc", "input_overrides", 1), (*INPUT_SETTINGS, "from_output", "bits_weights")),
        (("overrides", "fc", "input_overrides"), (0, "first", -1)),
        (("overrides",), ("layer2.*",)),
    ],
)
def test_schema_and_loader_agree_inside_overrides(place, names, loads):
    for name in names:
        for value in VALUES:
            tree = copy.deepcopy({"quantizers": QUANTIZER})
            inside = tree["quantizers"]
            for key in place:
                inside = inside[key]
            inside[name] = value
            assert bool(problems("config", tree)) != loads(tree), f"{name}: {value!r}"


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "clip_acts", "MEAN"),
        ((), "bits_parameters", 1),
        ((), "class", "QuantAwareTrainRangeLinearQuantizer"),
        ((), "mode", "SYMETRIC"),
        ((), "mode", {"activations": "SYMMETRIC"}),
        ((), "fake", True),
        (("overrides", "conv1"), "fp16", "yes"),
        (("overrides", "conv1"), "acts", 8),
        (("overrides", "fc", "input_overrides", 0), "clip_acts", "none of these"),
        (
            ("overrides", "fc", "input_overrides", 0),
            "mode",
            {"activations": "SYMMETRIC", "weights": "SYMMETRIC"},
        ),
    ],
)
def test_what_is_wrong_in_distillers_form_fits_neither(place, key, value, loads):
    tree = copy.deepcopy({"quantizers": DISTILLERS})
    inside: Any = tree["quantizers"]["post_train_quantizer"]
    for step in place:
        inside = inside[step]
    inside[key] = value
    assert problems("config", tree)
    assert not loads(tree)


def test_file_of_a_gate_fits_as_it_loads(loads):
    assert loads(GATE, load_gate)
    assert not problems("check", GATE)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "runs", []),
        ((), "runs", None),
        ((), "error_rate", 0.6),
        ((), "judge", "median"),
        ((), "quantizers", {}),
        (("runs", 0), "name", None),
        (("runs", 0), "expect", {}),
        (("runs", 0), "bits_weights", 4),
        (("runs", 0, "quantizers"), "bits_weights", 40),
        (("runs", 0, "expect"), "top1_min", 101),
        (("runs", 0, "expect"), "top1_min", "baseline * 2"),
        (("runs", 0, "expect"), "top1_min", "98 or so"),
        (("runs", 0, "expect"), "top1", 90),
    ],
)
def test_what_is_wrong_in_the_file_of_a_gate_fits_neither(place, key, value, loads):
    tree: Any = copy.deepcopy(GATE)
    inside = tree
    for step in place:
        inside = inside[step]
    inside[key] = value
    assert problems("check", tree)
    assert not loads(tree, load_gate)
