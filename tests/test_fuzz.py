"""Damaged files: whatever is in a config or a stats file, there is a run or an error in words."""

import random
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import qtool
from qtool.config import Config, QuantizeConfig, check, dump_config, layer_specs, load_config
from qtool.errors import QtoolError, StatsError
from qtool.graph.trace import layers, trace
from qtool.observers.files import read_stats
from qtool.observers.stats import ModelStats
from qtool.observers.stats_yaml import write_stats

NAMES = ("conv1", "relu", "layer1.0.conv1", "layer1.0.add", "fc")
OVERRIDES = {
    "conv1": {"input_overrides": {0: {"from_output": True}}, "mode": "asym_u", "bits_weights": 4},
    "layer1.*": {"clip_activations": "n_std", "clip_n_stds": 2.0, "fpq_module": 16, "fake": True},
    ".*relu": {"quantize_inputs": False, "make_identity": False, "clip_half_range": True},
    "fc": {"input_overrides": {0: {"clip_activations": "avg", "bits_activations": 5}}},
}
DISTILLER = """
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 6
    bits_parameters: null
    mode:
      activations: ASYMMETRIC_UNSIGNED
      weights: SYMMETRIC
    model_activation_stats: ../stats/file.yaml
    per_channel_wts: True
    clip_acts: AVG
    inputs_quant_auto_fallback: False
    overrides:
      conv1:
        bits_weights: 8
        input_overrides:
          0: {from_output: True}
      .*add: {bits_weights: 8, bits_activations: 8, fp16: True}
      fc:
        clip_acts: N_STD
        clip_n_stds: 3
        input_overrides:
          0: {clip_acts: AVG, mode: SYMMETRIC_RESTRICTED}
"""
# For any place of a file: structure, values of other types, extremes, and other keys' values.
PIECES = (
    ": ", "- ", "{", "}", "[", "]", ",", "'", '"', "#", "&a ", "*a", "!!int ", "!!set ", "!x ", "|\n", "? ",
    "\n", "  ", "\t", "---\n", "<<: ", "null", "true", "~", "0", "-1", "1", "8", "17", "1e400", ".nan",
    "-.inf", "0x" + "f" * 40, "9" * 30, "2026-01-01", "AVG", "laplace", "n_std", "sym", "asym_u",
    "ASYMMETRIC_SIGNED", "mode", "overrides", "input_overrides", "bits_weights", "bits_activations",
    "clip_n_stds", "fpq_module", "dynamic: true\n", "(", "*", "[a", "a{99999999999}", "(?P<", "\\", ".*",
    "\x00", "\x85", "\ud7ff", "é", "🙂", "min", "max", "output", "inputs", "shape: (1,", "1e-45", "3.4e38",
    "-3.4e38",
)  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """The text with one to three things wrong with it."""
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        kind, line = rng.randrange(7), rng.randrange(len(lines))
        start = rng.randrange(len(text) + 1)
        if kind == 0:
            text = text[:start] + rng.choice(PIECES) + text[start:]
        elif kind == 1:
            text = text[:start] + text[start + rng.randint(1, 12) :]
        elif kind == 2:
            del lines[line]
            text = "\n".join(lines)
        elif kind == 3:
            lines.insert(rng.randrange(len(lines)), lines[line])
            text = "\n".join(lines)
        elif kind == 4:
            lines[line] = " " * rng.randrange(10) + lines[line].strip()
            text = "\n".join(lines)
        else:  # most of all, another value behind a key
            key, colon, _ = lines[line].partition(":")
            lines[line] = key + colon + " " + rng.choice(PIECES)
            text = "\n".join(lines)
    return text or "x"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def assert_in_words(error: QtoolError, text: str) -> None:
    """One line for each problem, none of which is the text of a Python error."""
    for line in str(error).split("\n"):
        assert line.strip(), f"an empty line in {str(error)!r} for:\n{text}"
        assert ": " in line, f"{line!r} for:\n{text}"


def valid_config() -> str:
    return dump_config(Config(quantizers=QuantizeConfig(overrides=OVERRIDES, clip_activations="avg")))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("form", ["qtool", "distiller"])
def test_a_damaged_config_gives_specs_or_an_error_in_words(form, seed, tmp_path):
    rng = random.Random(f"{form} {seed}")
    valid = valid_config() if form == "qtool" else DISTILLER
    ends = {"specs": 0, "error": 0}
    for _ in range(100):  # most of them fail: so many that in every seed some pass
        text = mutated(valid, rng)
        path = write(tmp_path / "c.yaml", text)
        try:
            config = load_config(path) if form == "qtool" else load_config(quantizer_file=path)
            check(config.quantizers)
            specs = layer_specs(config.quantizers, NAMES)
            assert list(specs) == list(NAMES)
            dumped = dump_config(config)
            assert dump_config(load_config(write(tmp_path / "again.yaml", dumped))) == dumped, text
            ends["specs"] += 1
        except QtoolError as error:
            assert_in_words(error, text)
            ends["error"] += 1
    assert min(ends.values()) > 0


# Settings that pass on to a network


@pytest.fixture(scope="module")
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential()
        for name, layer in (("conv1", nn.Conv2d(1, 3, 3)), ("relu", nn.ReLU()), ("fc", nn.Linear(2, 3))):
            net.add_module(name, layer)
    return net.eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stats(net, x) -> ModelStats:
    return qtool.calibrate(net, [x])


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_stats_file_quantizes_or_gives_an_error_in_words(seed, net, x, stats, tmp_path):
    rng = random.Random(seed)
    valid = write_stats(stats)
    traced = trace(net, x)
    ends = {"run": 0, "error": 0}
    for _ in range(60):
        text = mutated(valid, rng)
        path = write(tmp_path / "s.yaml", text)
        clip = rng.choice(["none", "avg", "n_std", "gauss", "laplace"])
        config = QuantizeConfig(
            mode=rng.choice(["sym", "asym_u"]),
            clip_activations=clip,
            clip_n_stds=2 if clip == "n_std" else None,
            scale_approx_bits=rng.choice([None, 8]),
        )
        try:
            qtool.quantize(traced, read_stats(path), config)(x)
            ends["run"] += 1
        except QtoolError as error:
            assert_in_words(error, text)
            ends["error"] += 1
    assert min(ends.values()) > 0


def test_a_range_that_float32_cannot_hold_is_an_error_in_words(net, stats):
    record = replace(stats.output("conv1"), min=-3e38, max=3e38)
    layers = {**stats.layers, "conv1": replace(stats.layers["conv1"], output=record)}
    wide = replace(stats, layers=layers, fingerprint=None)
    with pytest.raises(
        StatsError, match=r"^this calibration: the output of layer 'conv1': x_min and x_max mu"
    ):
        qtool.quantize(nn.Sequential(OrderedDict(conv1=net.conv1)), wide)


SETTINGS = {
    "mode": ["sym", "sym_restr", "asym_s", "asym_u"],
    "bits_activations": [0, 2, 4, 8, 9, 16],
    "bits_weights": [0, 2, 8, 16],
    "bits_accum": [8, 16, 32, 64],
    "accum_dtype": ["float32", "float64"],
    "clip_activations": ["none", "avg", "n_std", "gauss", "laplace"],
    "clip_n_stds": [None, 2.0],
    "clip_half_range": [True, False],
    "per_channel_weights": [True, False],
    "scale_approx_bits": [None, 2, 8, 32],
    "inputs_quant_auto_fallback": [True, True, False],
    "fpq_module": [None, None, 16, 64],
}
OF_LAYERS = {
    "fake": [None, True, False],
    "make_identity": [True, False],
    "quantize_inputs": [True, False],
    "input_overrides": [{}, {0: {"from_output": True}}, {0: {"bits_activations": 3}}, {1: {"mode": "sym"}}],
}
OF_NETWORKS = {
    "dynamic": [True, False],
    "per_sample": [False, False, True],
    "also_clip_weights": [True, False],
    "save_fp_weights": [True, False],
    "no_quant_layers": [(), ("fc",)],
}


def some(rng: random.Random, choices: dict[str, list]) -> dict[str, object]:
    keys = rng.sample(sorted(choices), rng.randint(0, 5 if len(choices) > 5 else 2))
    return {key: rng.choice(choices[key]) for key in keys}


@pytest.mark.parametrize("seed", range(4))
def test_any_settings_quantize_or_give_an_error_in_words(seed, net, x, stats, tmp_path):
    rng = random.Random(seed)
    traced = trace(net, x)
    names = [name for name, _, _ in layers(traced)]
    ends = {"run": 0, "error": 0}
    for _ in range(40):
        overrides = {name: some(rng, SETTINGS) | some(rng, OF_LAYERS) for name in rng.sample(names, 1)}
        settings = some(rng, SETTINGS) | some(rng, OF_NETWORKS) | {"overrides": overrides}
        try:
            config = QuantizeConfig(**settings)
            model = qtool.quantize(traced, None if config.dynamic else stats, config, example=x)
            y = model(x)
            assert y.shape == (2, 3, 2, 3), settings
            assert bool(y.isfinite().all()), settings
            again = qtool.load(qtool.save(model, tmp_path / "q.pth"), net, example=x)
            assert torch.equal(again(x), y), settings
            ends["run"] += 1
        except QtoolError as error:
            assert_in_words(error, str(settings))
            ends["error"] += 1
    assert min(ends.values()) > 3


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("flag", ["--qe-config-file", "--qe-stats-file"])
def test_a_run_with_a_damaged_file_ends_well_or_with_an_error_in_words(flag, seed, run_cli, chdir_tmp):
    rng = random.Random(f"{flag} {seed}")
    quick = ("-j", "0", "--effective-test-size", "0.02")
    done = run_cli("calibrate", "--calib-samples", "4", "-j", "0", "-o", "measured")
    measured = Path(done.stdout.splitlines()[-1])
    valid = measured.read_text() if flag == "--qe-stats-file" else DISTILLER.replace("../stats/file", "s")
    write(chdir_tmp / "s.yaml", measured.read_text())
    codes = set()
    for _ in range(12):
        text = mutated(valid, rng)
        result = run_cli("quantize", flag, write(chdir_tmp / "damaged.yaml", text), *quick)
        assert result.exception is None or isinstance(result.exception, SystemExit), text
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == (1 if last.startswith("error: ") else 0), text
        codes.add(result.exit_code)
    assert 1 in codes


def test_the_files_that_are_damaged_are_valid(tmp_path, stats):
    for text in (valid_config(), DISTILLER):
        settings = load_config(write(tmp_path / "c.yaml", text)).quantizers
        check(settings)
        assert layer_specs(settings, NAMES)["fc"].inputs[0].clip.mode == "avg"
    assert read_stats(write(tmp_path / "s.yaml", write_stats(stats))).layers == stats.layers
    assert yaml.safe_load(DISTILLER)
