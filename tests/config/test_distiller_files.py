"""Distiller's own YAML files, its keys and spellings, and what is said of a wrong one."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qtool.config import Config, QuantizeConfig, check, dump_config, layer_specs, load_config
from qtool.errors import ConfigError
from qtool.numerics.spec import ClipSpec, InputSpec, QuantSpec
from qtool.observers.files import read_stats

STATS = "resnet18_quant_stats.yaml"
# conv1 and fc in 8 bits, or the additions, or the last layer not clipped: the runs that the file lists.
EIGHT = {"bits_weights": 8, "bits_activations": 8}
RUNS = {
    3: {"fc": {"clip_activations": "none"}},
    4: {".*add": EIGHT, "fc": {"clip_activations": "none"}},
    5: {"conv1": EIGHT, "fc": {**EIGHT, "clip_activations": "none"}},
    6: {"conv1": EIGHT, ".*add": EIGHT, "fc": {**EIGHT, "clip_activations": "none"}},
}


@pytest.fixture
def distiller(shared_data) -> Path:
    return shared_data / "distiller"


@pytest.fixture
def read(write_config):
    """The quantizer settings of a component with these lines, each indented by itself."""

    def read(body: str) -> QuantizeConfig:
        return load_config(quantizer_file=component(write_config, body)).quantizers

    return read


@pytest.fixture
def problems(write_config):
    """What is wrong with a component of these lines, each as `line: text`; the first line is 4."""

    def problems(body: str) -> list[str]:
        path = component(write_config, body)
        with pytest.raises(ConfigError) as caught:
            load_config(quantizer_file=path)
        return [line.removeprefix(f"{path}:") for line in str(caught.value).splitlines()]

    return problems


def component(write_config, body: str) -> Path:
    head = "quantizers:\n  post_train_quantizer:\n    class: PostTrainLinearQuantizer\n"
    return write_config(head + "".join(f"    {line}\n" for line in body.splitlines()))


def uncommented(text: str, heading: str) -> str:
    """The file with the commented block under a heading put into force."""
    before, after = text.split(heading, 1)
    lines = after.split("\n")[1:]
    size = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    block = [line.removeprefix("#") for line in lines[:size]]
    return "\n".join([before, *block, *lines[size:]])


# Distiller's files


def test_the_documented_file_gives_six_bits_clipped_per_channel(distiller):
    found = load_config(distiller / "resnet18_imagenet_post_train.yaml").quantizers
    assert found == QuantizeConfig(
        mode="asym_u",
        bits_activations=6,
        bits_weights=6,
        per_channel_weights=True,
        clip_activations="avg",
        stats_file=distiller / STATS,
    )


@pytest.mark.parametrize("number", RUNS)
def test_each_documented_run_of_the_file_has_its_overrides(number, distiller, tmp_path):
    text = (distiller / "resnet18_imagenet_post_train.yaml").read_text(encoding="utf-8")
    path = tmp_path / "run.yaml"
    path.write_text(uncommented(text, f"# Overrides section for run {number}"), encoding="utf-8")
    found = load_config(path).quantizers
    check(found)
    assert found.overrides == RUNS[number]
    assert found.bits_weights == 6


def test_the_documented_pair_of_modes_takes_the_place_of_one(distiller, tmp_path):
    text = (distiller / "resnet18_imagenet_post_train.yaml").read_text(encoding="utf-8")
    pair = "    # mode:\n    #   activations: ASYMMETRIC_UNSIGNED\n    #   weights: SYMMETRIC\n"
    text = text.replace(pair, pair.replace("# ", "", 1).replace("# ", "  ").replace("      a", "      a"))
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("    mode: ASYMMETRIC_UNSIGNED\n", ""), encoding="utf-8")
    found = load_config(path).quantizers
    assert (found.mode_activations, found.mode_weights) == ("asym_u", "sym")


def test_the_file_of_input_overrides_gives_inputs_their_own_clipping(distiller):
    found = load_config(distiller / "resnet18_imagenet_post_train_input_overrides.yaml").quantizers
    assert not found.inputs_quant_auto_fallback
    specs = layer_specs(found, list(read_stats(distiller / STATS).layers))
    grid = QuantSpec.from_mode("asym_u", 8)
    assert specs["conv1"].inputs == {0: InputSpec(grid, ClipSpec("avg"))}
    assert (specs["fc"].clip.mode, specs["fc"].inputs) == ("none", {0: InputSpec(grid, ClipSpec("avg"))})
    assert specs["layer1.0.conv1"].inputs == {}


def test_the_file_for_lapq_quantizes_what_it_says_it_does(distiller):
    found = load_config(distiller / "resnet18_imagenet_post_train_lapq.yaml").quantizers
    specs = layer_specs(found, list(read_stats(distiller / STATS).layers))
    bits = {n: [g and g.num_bits for g in (s.weight, s.output)] for n, s in specs.items()}
    assert bits["conv1"] == bits["fc"] == bits["layer4.1.conv2"] == [None, None]
    assert bits["layer1.0.conv1"] == bits["layer2.0.downsample.0"] == [4, None]
    assert bits["layer1.0.relu1"][1] == 4
    assert bits["layer4.1.relu2"] == [None, None]
    assert not specs["layer1.0.relu1"].quantize_inputs
    assert specs["layer1.0.relu1"].output.mode == "asym_u"
    assert specs["layer1.0.conv1"].weight.mode == "sym"


@pytest.mark.parametrize("name", ["", "_input_overrides", "_lapq"])
def test_config_of_a_run_with_a_file_of_distiller_reads_back_the_same(name, distiller, write_config):
    config = load_config(distiller / f"resnet18_imagenet_post_train{name}.yaml")
    config = replace(config, run=replace(config.run, out_dir=Path("/nowhere")))
    assert load_config(write_config(dump_config(config))) == config


def test_a_file_in_place_of_the_quantizer_leaves_the_other_sections(distiller, write_config):
    path = write_config("run: {seed: 7}\nquantizers: {bits_weights: 3}\n")
    config = load_config(path, quantizer_file=distiller / "resnet18_imagenet_post_train.yaml", seed=8)
    assert (config.run.seed, config.quantizers.bits_weights) == (8, 6)


# Keys and spellings


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("bits_activations: 5", {"bits_activations": 5}),
        ("bits_activations: null", {"bits_activations": 0}),
        ("bits_parameters: 4", {"bits_weights": 4}),
        ("bits_parameters: null", {"bits_weights": 0}),
        ("bits_accum: 16", {"bits_accum": 16}),
        ("mode: SYMMETRIC", {"mode": "sym"}),
        ("mode: SYMMETRIC_RESTRICTED", {"mode": "sym_restr"}),
        ("mode: ASYMMETRIC_SIGNED", {"mode": "asym_s"}),
        (
            "mode: {activations: ASYMMETRIC_UNSIGNED, weights: SYMMETRIC}",
            {"mode_activations": "asym_u", "mode_weights": "sym"},
        ),
        ("clip_acts: LAPLACE", {"clip_activations": "laplace"}),
        ("{clip_acts: N_STD, clip_n_stds: 2}", {"clip_activations": "n_std", "clip_n_stds": 2.0}),
        ("clip_half_range: True", {"clip_half_range": True}),
        ("per_channel_wts: True", {"per_channel_weights": True}),
        ("scale_approx_mult_bits: 8", {"scale_approx_bits": 8}),
        ("inputs_quant_auto_fallback: False", {"inputs_quant_auto_fallback": False}),
        ("fp16: True", {"fpq_module": 16}),
        ("fp16: False", {}),
        ("fpq_module: 64", {"fpq_module": 64}),
        ("{fp16: True, fpq_module: 16}", {"fpq_module": 16}),
        ("save_fp_weights: True", {"save_fp_weights": True}),
        ("also_clip_weights: True", {"also_clip_weights": True}),
        ("overrides: null", {}),
    ],
)
def test_a_key_of_distiller_is_the_setting_of_qtool(text, settings, read):
    # As one mapping, a component's settings are merged by YAML itself.
    body = f"<<: {text}" if text.startswith("{") else text
    assert read(body) == QuantizeConfig(**settings)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("{bits_weights: null, bits_activations: 4}", {"bits_weights": 0, "bits_activations": 4}),
        ("{bits_weights: 4, bits_bias: 16}", {"bits_weights": 4}),
        ("{fp16: True, fake: True}", {"fpq_module": 16, "fake": True}),
        ("{fpq_module: null}", {"fpq_module": None}),
        ("{make_identity: True}", {"make_identity": True}),
        ("{quantize_inputs: False}", {"quantize_inputs": False}),
        ("{mode: {activations: SYMMETRIC, weights: ASYMMETRIC_SIGNED}}",
         {"mode_activations": "sym", "mode_weights": "asym_s"}),
        ("{per_channel_wts: True, scale_approx_mult_bits: null}",
         {"per_channel_weights": True, "scale_approx_bits": None}),
        ("{clip_acts: N_STD, clip_n_stds: 3}", {"clip_activations": "n_std", "clip_n_stds": 3.0}),
        ("{input_overrides: {0: {from_output: True, bits_activations: 4}}}",
         {"input_overrides": {0: {"from_output": True}}}),
        ("{input_overrides: {'1': {clip_acts: AVG, mode: SYMMETRIC}}}",
         {"input_overrides": {1: {"clip_activations": "avg", "mode": "sym"}}}),
    ],
)  # fmt: skip
def test_a_key_of_an_override_is_the_setting_of_qtool(text, settings, read):
    assert read(f"overrides:\n  fc: {text}").overrides == {"fc": settings}


@pytest.mark.parametrize(
    "mode", ["mode: ASYMMETRIC_UNSIGNED", "mode: {activations: ASYMMETRIC_UNSIGNED, weights: SYMMETRIC}"]
)
def test_settings_of_an_input_are_those_of_the_output_but_for_what_is_given(mode, read):
    text = "fc: {bits_activations: 6, clip_acts: AVG, clip_half_range: True, input_overrides: %s}"
    inputs = (
        "{0: {from_output: True}, 1: {bits_activations: 4}, 2: {mode: ASYMMETRIC_SIGNED, clip_acts: NONE}}"
    )
    spec = layer_specs(read(f"{mode}\noverrides:\n  {text % inputs}"), ["fc"])["fc"]
    assert spec.clip.half_range
    assert spec.inputs == {
        0: InputSpec(QuantSpec.from_mode("asym_u", 6), ClipSpec("avg")),
        1: InputSpec(QuantSpec.from_mode("asym_u", 4), ClipSpec("avg")),
        2: InputSpec(QuantSpec.from_mode("asym_s", 6), ClipSpec("none")),
    }


def test_a_component_in_any_section_is_found(write_config):
    path = write_config(
        "policies: [{quantizer: {instance_name: q}}]\nlr_schedulers: {a: {class: StepLR}}\n"
        "others: {q: {class: PostTrainLinearQuantizer, bits_parameters: 3}}\n"
    )
    assert load_config(quantizer_file=path).quantizers.bits_weights == 3


def test_a_literal_name_wins_over_an_expression_that_stands_before_it(read):
    config = read("overrides:\n  layer.*: {bits_weights: 4}\n  layer2: {bits_activations: 5}")
    specs = layer_specs(config, ["layer1", "layer2"])
    assert [specs[n].weight.num_bits for n in specs] == [4, 8]
    assert [specs[n].output.num_bits for n in specs] == [8, 5]


# Paths


@pytest.mark.parametrize("named", ["../../stats/s.yaml", "/gone/away/../s.yaml"])
def test_statistics_that_lead_nowhere_are_looked_up_by_name_beside_the_file(named, read, tmp_path):
    (tmp_path / "s.yaml").write_text("")
    absolute = named.startswith("/")
    assert read(f"model_activation_stats: {named}").stats_file == (
        Path(named) if absolute else tmp_path / "s.yaml"
    )


def test_a_path_that_leads_somewhere_wins_over_its_name_beside_the_file(read, tmp_path):
    (tmp_path / "inner").mkdir()
    for path in ("s.yaml", "inner/s.yaml"):
        (tmp_path / path).write_text("")
    assert read("model_activation_stats: inner/s.yaml").stats_file == tmp_path / "inner" / "s.yaml"


def test_statistics_that_are_nowhere_keep_their_name(read):
    assert read("model_activation_stats: ../gone/s.yaml").stats_file == Path("../gone/s.yaml")


# Problems


def test_all_problems_are_reported_together_with_their_lines(problems):
    found = problems(
        "bits_parameters: 40\n"
        "clip_act: AVG\n"
        "make_identity: True\n"
        "overrides:\n"
        "  conv1: {acts: 8, wts: 4, bias: 32}\n"
        "  fc:\n"
        "    clip_acts: LOWEST\n"
        "  relu:\n"
    )
    assert [line.split(": ", 1)[0] for line in found] == ["4", "5", "6", "8", "8", "8", "10", "11"]
    assert found[0].endswith("quantizers.bits_parameters: 40 is not 0 (float) or in the range 2<=x<=16.")
    assert "unknown key 'clip_act'; did you mean 'clip_activations'" in found[1]
    assert found[2].endswith("'make_identity' is a setting of single layers; put it under 'overrides'")
    assert found[3].endswith("overrides.conv1: key 'acts' is an old spelling; write 'bits_activations'")
    assert found[5].endswith("key 'wts' is an old spelling; write 'bits_weights'")
    assert "overrides.fc.clip_acts: 'lowest' is not one of 'none', 'avg'" in found[6]
    assert found[7] == "11: overrides.relu: a mapping of settings is wanted"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mode: ASYMMETRIC", "mode: 'ASYMMETRIC' is not one of 'sym', 'sym_restr', 'asym_s', 'asym_u'"),
        ("mode: {activations: SYMMETRIC}",
         "mode: found {'activations': 'SYMMETRIC'}; a name, or a mapping of both"),
        ("mode: {}", "mode: found {}; a name, or a mapping of both activations and weights, is wanted"),
        ("mode: {activations: SYM, weights: SYMMETRIC}", "mode: 'SYM' is not one of"),
        ("input_overrides: {0: {from_output: True}}", "'input_overrides' is a setting of single layers"),
        ("fake: True", "'fake' is a setting of single layers; put it under 'overrides'"),
        ("quantize_inputs: False", "'quantize_inputs' is a setting of single layers"),
        ("fpq_module: 8", "fpq_module: '8' is not one of 16, 32, 64."),
        ("fp16: True\nfpq_module: 32", "fpq_module: 32 contradicts another key of this setting: 16"),
        ("bits_parameters: 4\nbits_weights: 6", "bits_weights: 6 contradicts another key of this setting: 4"),
        ("overrides: {fc: {per_channel: True}}",
         "overrides.fc: unknown key 'per_channel'; did you mean 'per_channel_"),
        ("overrides: {fc: {save_fp_weights: True}}",
         "overrides.fc: key 'save_fp_weights' cannot be set here;"),
        ("overrides: {fc: {input_overrides: [1]}}", "fc.input_overrides: a mapping of input numbers"),
        ("overrides: {fc: {input_overrides: {a: {}}}}", "fc.input_overrides.a: an input number (0, 1, ...)"),
        ("overrides: {fc: {input_overrides: {0: 8}}}", "fc.input_overrides.0: an input number (0, 1, ...)"),
        ("overrides: {fc: {input_overrides: {0: {bits_weights: 8}}}}",
         "fc.input_overrides.0: key 'bits_weights' cannot be set here; mode, bits_activations, clip_"),
        ("overrides: {fc: {input_overrides: {0: {bits_activations: 1}}}}",
         "fc.input_overrides.0.bits_activations: 1 is not 0 (float) or in the range"),
        ("overrides: {fc: {input_overrides: {0: {from_output: 3}}}}",
         "fc.input_overrides.0.from_output: found 3; true or false is wanted"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(body, message, problems):
    (found,) = problems(body)
    assert re.match(r"\d+: ", found)
    assert message in found


def test_a_file_without_a_quantizer_says_what_is_wanted(write_config):
    path = write_config("lr_schedulers: {a: {class: StepLR}}")
    with pytest.raises(ConfigError, match=r"config.yaml: no quantizer found; a component with class: PostT"):
        load_config(quantizer_file=path)


def test_two_quantizers_in_one_section_are_refused(write_config):
    text = "{class: PostTrainLinearQuantizer}"
    path = write_config(f"quantizers:\n  a: {text}\n  b: {text}\n")
    with pytest.raises(ConfigError, match=r"config.yaml:1: quantizers: more than one quantizer; one is w"):
        load_config(path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            "{clip_acts: N_STD}",
            "overrides.fc.input_overrides.0: --qe-clip-acts n_std: needs --qe-clip-n-stds",
        ),
        (
            "{clip_acts: GAUSS, bits_activations: 9}",
            "overrides.fc.input_overrides.0: --qe-clip-acts gauss: has",
        ),
        ("{bits_activations: null}", "overrides.fc.input_overrides.0: an input needs 2 to 16 bits"),
    ],
)
def test_settings_of_an_input_that_contradict_each_other_are_refused_before_the_run(inputs, message, read):
    config = read(f"overrides:\n  fc: {{input_overrides: {{0: {inputs}}}}}")
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert str(caught.value).startswith(message)


def test_a_layer_left_in_float_needs_no_grid_for_its_inputs(read):
    config = replace(
        read("overrides:\n  fc: {input_overrides: {0: {clip_acts: AVG}}}"), no_quant_layers=("fc",)
    )
    check(config)
    assert layer_specs(config, ["fc"])["fc"].inputs == {}


# The run's own copy


def test_overrides_of_all_kinds_read_back_the_same(write_config):
    overrides = {
        "conv1": {"input_overrides": {0: {"from_output": True}}, "bits_weights": 0, "clip_n_stds": None},
        "fc": {"input_overrides": {0: {"clip_activations": "avg", "bits_activations": 4, "mode": "asym_s"}}},
        "relu": {"make_identity": True},
        "pool": {"quantize_inputs": False, "fpq_module": 16, "fake": False},
    }
    quantizers = QuantizeConfig(dynamic=True, per_sample=True, fpq_module=64, overrides=overrides)
    config = replace(Config(), quantizers=quantizers)
    text = dump_config(replace(config, run=replace(config.run, out_dir=Path("/nowhere"))))
    assert load_config(write_config(text)).quantizers == quantizers
    assert yaml.safe_load(text)["quantizers"]["overrides"] == overrides
