"""A YAML file and flags give a Config, or every problem of the file in a line each."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.config import SECTIONS, Config, QuantizeConfig, dump_config, load_config, options_of
from qtool.errors import ConfigError

# The fixture's folder is the same for all examples, and each writes its file anew.
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def problems_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


# Precedence


def test_nothing_gives_the_defaults():
    assert load_config() == Config()


def test_file_wins_over_default(write_config):
    config = load_config(write_config("quantizers:\n  bits_weights: 4\n"))
    assert config == Config(quantizers=QuantizeConfig(bits_weights=4))


def test_flag_wins_over_file(write_config):
    path = write_config("quantizers:\n  bits_weights: 4\n  bits_activations: 5\n")
    found = load_config(path, bits_weights=6).quantizers
    assert (found.bits_weights, found.bits_activations) == (6, 5)


def test_flag_that_is_not_given_does_not_hide_the_file(write_config):
    path = write_config("quantizers:\n  bits_weights: 4\n  no_quant_layers: [fc]\n")
    found = load_config(path, bits_weights=None, no_quant_layers=()).quantizers
    assert (found.bits_weights, found.no_quant_layers) == (4, ("fc",))


@pytest.mark.parametrize(("flag", "expected"), [(False, False), (None, True)])
def test_flag_of_false_wins_over_true(write_config, flag, expected):
    path = write_config("quantizers:\n  per_channel_weights: true\n")
    assert load_config(path, per_channel_weights=flag).quantizers.per_channel_weights is expected


def test_flag_of_zero_wins_over_the_file(write_config):
    assert load_config(write_config("quantizers:\n  bits_weights: 4\n"), bits_weights=0).quantizers == (
        QuantizeConfig(bits_weights=0)
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "{}", "model: {arch: null}\n"])
def test_empty_file_sections_and_values_give_the_defaults(write_config, text):
    assert load_config(write_config(text)) == Config()


# Values


def test_values_get_the_types_of_their_flags(write_config):
    config = load_config(
        write_config(
            "model: {arch: resnet18, input_shape: [3, 32, 32]}\n"
            "data: {mean: [0.5, 0.25, 1], std: 0.5, effective_test_size: 1}\n"
            "quantizers: {no_clip_layers: fc, no_quant_layers: [conv1, 'layer1.*'], clip_n_stds: 2}\n"
        )
    )
    assert config.model.input_shape == (3, 32, 32)
    assert (config.data.mean, config.data.std) == ((0.5, 0.25, 1.0), (0.5,))
    assert config.quantizers.no_clip_layers == ("fc",)
    assert config.quantizers.no_quant_layers == ("conv1", "layer1.*")
    assert (config.quantizers.clip_n_stds, config.data.effective_test_size) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bits_weights: 1", "1 is not 0 (float) or in the range 2<=x<=16."),
        ("bits_weights: 40", "40 is not 0 (float) or in the range 2<=x<=16."),
        ("bits_weights: -2", "-2 is not 0 (float) or in the range 2<=x<=16."),
        ("bits_weights: 7.9", "'7.9' is not a valid integer."),
        ("bits_weights: four", "'four' is not a valid integer."),
        ("bits_weights: true", "found True; a value (integer) is wanted"),
        ("bits_weights: [4]", "found list; a single value is wanted"),
        ("bits_weights: {a: 4}", "found dict; a single value is wanted"),
        ("mode: !!set {sym}", "found set; a single value is wanted"),
        ("bits_accum: 7", "7 is not in the range 8<=x<=64."),
        ("mode: symmetric", "'symmetric' is not one of 'sym', 'sym_restr', 'asym_s', 'asym_u'."),
        ("accum_dtype: mse", "'mse' is not one of 'float32', 'float64'."),
        ("clip_n_stds: 0", "0 is not a positive number."),
        ("clip_n_stds: .nan", "nan is not a positive number."),
        ("scale_approx_bits: 1", "1 is not in the range 2<=x<=32."),
        ("per_channel_weights: 1", "found 1; true or false is wanted"),
        ("per_channel_weights: 'yes'", "found 'yes'; true or false is wanted"),
    ],
)
def test_value_out_of_its_limits_is_refused_with_its_line(write_config, setting, message):
    """E8: bits of 1, -1 or 40 were not checked."""
    path = write_config(f"# a comment\nquantizers:\n  {setting}\n")
    assert problems_of(path) == f"{path}:3: quantizers.{setting.split(':')[0]}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibration: {fraction: 0}", "calibration.fraction: 0 is not in the range 0<x<=1."),
        ("calibration: {fraction: 1.5}", "calibration.fraction: 1.5 is not in the range 0<x<=1."),
        ("model: {input_shape: '3,224'}", "model.input_shape: '3,224' is not channels, height and width"),
        ("data: {mean: a}", "data.mean: 'a' is not a list of numbers"),
        ("data: {batch_size: 0}", "data.batch_size: 0 is not in the range x>=1."),
        ('data: {path: "a\\0b"}', "data.path: cannot be used: embedded null byte"),
        (f"run: {{seed: 0x{'f' * 5000}}}", "run.seed: cannot be used: Exceeds the limit"),
        ("run: 3", "run: found 3; a mapping of settings is wanted"),
    ],
)
def test_senseless_value_is_refused(write_config, text, message):
    path = write_config(text)
    assert problems_of(path).startswith(f"{path}:1: {message}")


@pytest.mark.parametrize("key", ["bits_weights", "bits_activations"])
def test_null_bits_stay_in_float(write_config, key):
    assert getattr(load_config(write_config(f"quantizers: {{{key}: null}}")).quantizers, key) == 0
    overrides = load_config(write_config(f"quantizers: {{overrides: {{fc: {{{key}: null}}}}}}")).quantizers
    assert overrides.overrides == {"fc": {key: 0}}


def test_null_in_an_override_clears_what_may_be_absent_and_leaves_the_rest(write_config):
    path = write_config("quantizers: {overrides: {fc: {mode: null, bits_accum: null, clip_n_stds: null}}}")
    assert load_config(path).quantizers.overrides == {"fc": {"clip_n_stds": None}}


@pytest.mark.parametrize(
    ("text", "settings", "found"),
    [
        (
            "{fc: {0: {mode: {activations: sym, weights: sym}}}}",
            "mode",
            "{'activations': 'sym', 'weights': 'sym'}",
        ),
        ("{fc: {0: {mode: {activations: sym}}}}", "mode", "{'activations': 'sym'}"),
    ],
)
def test_input_has_one_mode(write_config, text, settings, found):
    tree = {"quantizers": {"overrides": {p: {"input_overrides": s} for p, s in yaml.safe_load(text).items()}}}
    path = write_config(yaml.safe_dump(tree))
    assert problems_of(path) == (
        f"{path}:5: overrides.fc.input_overrides.0.mode: found {found}; an input has one mode, such as asym_u"
    )


# Devices


def test_file_names_one_device(write_config):
    path = write_config("run:\n  gpus: 0\n  cpu: true\n")
    assert problems_of(path) == (
        f"{path}:2: run: cpu and gpus both say where the network runs; keep one of them"
    )


@pytest.mark.parametrize(
    ("text", "flag", "device"),
    [
        ("cpu: true", {"gpus": "1"}, "cuda:1"),
        ("gpus: 1", {"cpu": True}, "cpu"),
        ("gpus: 1", {"device": "cpu"}, "cpu"),
        ("gpus: 1", {"cpu": False}, "cuda:1"),
        ("{device: cpu, cpu: false, gpus: null}", {"gpus": "0"}, "cuda:0"),
    ],
)
def test_flag_for_a_device_wins_over_every_device_of_the_file(write_config, text, flag, device):
    text = text if text.startswith("{") else f"{{{text}}}"
    assert load_config(write_config(f"run: {text}"), **flag).run.chosen_device == device


# Keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "quantizers:\n  bits_wieghts: 4",
            "2: quantizers: unknown key 'bits_wieghts'; did you mean 'bits_wei",
        ),
        ("quantisers:\n  bits_weights: 4", "1: unknown section 'quantisers'; did you mean 'quantizers'?"),
        ("run:\n  3: 4", "2: run: unknown key '3'"),
        (
            "quantizers:\n  overrides:\n    fc:\n      bits_wts: 4",
            "4: overrides.fc: unknown key 'bits_wts'; did you mean 'bits_weights'",
        ),
        (
            "quantizers:\n  overrides:\n    fc:\n      bits_weights: 40",
            "4: overrides.fc.bits_weights: 40 is not 0 (float) or in the range 2<=x<=16.",
        ),
        ("quantizers:\n  overrides:\n    fc: 4", "3: overrides.fc: a mapping of settings is wanted"),
        (
            "quantizers:\n  overrides: [fc]",
            "2: overrides: found list; a mapping of layer patterns",
        ),
        ("run:\n  seed: 1\n  seed: 2", "3: key 'seed' stands a second time; the first is in line 2"),
        ("run:\n  seed: 1\nrun:\n  name: a", "3: key 'run' stands a second time; the first is in line 1"),
    ],
)
def test_wrong_key_is_refused_with_its_line(write_config, text, message):
    path = write_config(text)
    assert problems_of(path).startswith(f"{path}:{message}")


def test_all_problems_are_reported_together_in_the_order_of_lines(write_config):
    path = write_config("run: {seed: -1}\nmodel:\n  arhc: a\nquantizers:\n  mode: none\n  bits_accum: 1\n")
    lines = problems_of(path).splitlines()
    assert [line.split(":")[1] for line in lines] == ["1", "3", "5", "6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {seed: 1", ": not valid YAML: while parsing a flow mapping"),
        ("run: {seed: !!int ''}", ": not valid YAML: string index out of range"),
        ("run: {seed: !!bool maybe}", ": not valid YAML: 'maybe'"),
        ("run: {seed: !!timestamp maybe}", ": not valid YAML: 'NoneType' object"),
        ("[" * 1000, ": not valid YAML: maximum recursion depth exceeded"),
        ("&a {run: *a}", ": not valid YAML: maximum recursion depth exceeded"),
        ("- run", ":1: found list; a mapping of sections is wanted"),
        ("words", ":1: found str; a mapping of sections is wanted"),
        (b"\xff\xfe\x00", ": not a text file; a YAML file is wanted"),
    ],
)
def test_malformed_file_is_explained_in_one_line(write_config, content, message):
    path = write_config(content)
    problems = problems_of(path)
    assert problems.startswith(f"{path}{message}")
    assert "\n" not in problems


@pytest.mark.parametrize(("name", "message"), [("none.yaml", "No such file"), ("", "Is a directory")])
def test_file_that_cannot_be_read_is_explained(tmp_path, name, message):
    assert f"cannot be read: {message}" in problems_of(tmp_path / name)


# Paths


def test_relative_path_is_looked_up_beside_the_file(write_config, tmp_path):
    (tmp_path / "images").mkdir()
    assert load_config(write_config("data: {path: images}")).data.path == tmp_path / "images"


def test_relative_path_that_is_not_beside_the_file_stays_relative(write_config):
    assert load_config(write_config("data: {path: images}")).data.path == Path("images")


def test_variable_in_a_path_is_replaced(write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGES_HERE", str(tmp_path))
    monkeypatch.setenv("PART", "val")
    path = write_config("data: {path: '${IMAGES_HERE}/images/${PART}', split: '${PART}'}")
    found = load_config(path).data
    assert (found.path, found.split) == (tmp_path / "images" / "val", "${PART}")


def test_variable_that_is_not_set_is_refused_with_its_line(write_config, monkeypatch):
    monkeypatch.delenv("IMAGES_HERE", raising=False)
    path = write_config("data:\n  path: ${IMAGES_HERE}/images\nquantizers: {stats_file: $x}")
    assert problems_of(path) == (
        f"{path}:2: data.path: found ${{IMAGES_HERE}}/images, but IMAGES_HERE is not set; "
        "set it, as in 'export IMAGES_HERE=/path/to', or name another path"
    )


def test_variable_of_a_path_that_a_flag_replaces_need_not_be_set(write_config, monkeypatch):
    monkeypatch.delenv("IMAGES_HERE", raising=False)
    path = write_config("data:\n  path: ${IMAGES_HERE}/images\n")
    assert load_config(path, path=Path("mine")).data.path == Path("mine")


def test_path_longer_than_any_file_name_stays_as_it_is(write_config):
    assert load_config(write_config(f"data: {{path: {'a' * 5000}}}")).data.path == Path("a" * 5000)


# Round trip


VALUES = {
    "arch": st.text(max_size=8),
    "weights": st.sampled_from(["null", "true", "1", "~", "a: b", "IMAGENET1K_V2"]),
    "num_classes": st.integers(1, 10**6),
    "input_shape": st.tuples(*[st.integers(1, 999)] * 3),
    "mean": st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3).map(tuple),
    "dataset": st.sampled_from(["folder", "npz"]),
    "path": st.text(alphabet="ab .-", min_size=1, max_size=5).map(lambda t: Path("/nowhere") / t),
    "fraction": st.floats(0, 1, exclude_min=True),
    "skip_bad_images": st.booleans(),
    "bits_weights": st.sampled_from([0, 2, 16]),
    "clip_n_stds": st.floats(0, exclude_min=True, allow_infinity=False),
    "scale_approx_bits": st.integers(2, 32),
    "no_quant_layers": st.lists(st.text(max_size=6), min_size=1, max_size=3).map(tuple),
}
OVERRIDES = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.fixed_dictionaries(
        {}, optional={"bits_weights": st.sampled_from([0, 4]), "clip_n_stds": st.none() | st.just(2.5)}
    ),
    max_size=3,
)


@reuse_folder
@given(flags=st.fixed_dictionaries({}, optional=VALUES), overrides=OVERRIDES)
def test_dumped_config_loads_to_the_same(write_config, flags, overrides):
    config = load_config(None, **flags)
    config = replace(config, quantizers=replace(config.quantizers, overrides=overrides))
    config = replace(config, run=replace(config.run, out_dir=Path("/nowhere/logs")))
    assert load_config(write_config(dump_config(config))) == config


def test_dumped_config_names_every_option():
    tree = yaml.safe_load(dump_config(Config()))
    for section, cls in SECTIONS.items():
        assert set(tree[section]) >= {name for name, _, option in options_of(cls) if not option.layer_only}


def test_dumped_paths_are_absolute(chdir_tmp):
    tree = yaml.safe_load(dump_config(load_config(path=Path("images"))))
    assert tree["data"]["path"] == str(chdir_tmp / "images")


# Any YAML gives a Config or a ConfigError, nothing else

KEYS = [*SECTIONS, *(name for cls in SECTIONS.values() for name, _, _ in options_of(cls)), "overrides"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
trees = st.recursive(
    scalars | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | scalars, inner, max_size=4)
    ),
    max_leaves=10,
)
VALID = {section: dict(values) for section, values in yaml.safe_load(dump_config(Config())).items()}
VALID["quantizers"]["overrides"] = {"conv1": {"bits_weights": 4}, "layer.*": {"mode": "asym_u"}}


def check_config_or_config_error(path: Path) -> None:
    try:
        assert set(asdict(load_config(path))) == set(SECTIONS)
    except ConfigError as error:
        assert str(error).startswith(f"{path}:")


@reuse_folder
@given(tree=trees)
def test_any_yaml_gives_a_config_or_a_config_error(write_config, tree):
    check_config_or_config_error(write_config(yaml.dump(tree, allow_unicode=True)))


@reuse_folder
@given(section=st.sampled_from(list(SECTIONS)), value=trees, data=st.data())
def test_any_change_of_a_value_gives_a_config_or_a_config_error(write_config, section, value, data):
    tree = copy.deepcopy(VALID)
    tree[section][data.draw(st.sampled_from(sorted(tree[section])))] = value
    check_config_or_config_error(write_config(yaml.dump(tree, allow_unicode=True)))


@reuse_folder
@given(start=st.integers(0, 1500), length=st.integers(0, 9), text=st.text(max_size=4))
def test_any_change_of_the_text_gives_a_config_or_a_config_error(write_config, start, length, text):
    valid = yaml.safe_dump(VALID, sort_keys=False)
    changed = valid[:start] + text + valid[start + length :]
    check_config_or_config_error(write_config(changed))
