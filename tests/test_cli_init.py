"""qtool init writes a file that loads and runs as it is, and whose comments hold once they are none."""

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import jsonschema
import pytest
import torch
import yaml

from qtool.config import SECTIONS, Config, load_config, options_of
from qtool.config.template import ALWAYS
from qtool.models import load_model

QUICK = ("--effective-test-size", "0.05", "--calib-samples", "8", "-j", "0")


@pytest.fixture
def init(run_cli):
    """Write a file, which must end well: its text."""

    def init(*args: object) -> str:
        done = run_cli("init", *args)
        assert done.exit_code == 0, done.output
        if "-" in args:
            return done.stdout
        file = args[args.index("-o") + 1] if "-o" in args else "qtool.yaml"
        assert done.stdout == f"{file}: run it with 'qtool quantize -c {file}'\n"
        return Path(str(file)).read_text()

    return init


def uncommented(text: str) -> str:
    """With every option that stood in a comment."""
    return re.sub(r"^( +)#(?=[^ ]| {2})", r"\1", text, flags=re.MULTILINE)


def test_file_of_the_embedded_network_loads_and_runs_as_it_is(init, run_cli):
    init()
    assert load_config(Path("qtool.yaml")) == Config()
    done = run_cli("quantize", "-c", "qtool.yaml", *QUICK)
    assert done.exit_code == 0, done.output
    results = json.loads((Path(done.stdout.splitlines()[-1]) / "results.json").read_text())
    assert results["model"]["arch"] == "digits_resnet"
    assert results["quantized"]["top1"] > 90


def test_file_of_a_torchvision_network_names_layers_that_exist(init, run_cli):
    text = init("-a", "squeezenet1_1")
    assert load_config(Path("qtool.yaml")) == load_config(arch="squeezenet1_1")
    assert run_cli("layers").exit_code == 0
    Path("all.yaml").write_text(uncommented(text))
    done = run_cli("layers", "-c", "all.yaml")
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    overrides = yaml.safe_load(uncommented(text))["quantizers"]["overrides"]
    assert list(overrides) == ["features.0", "classifier.1", r"features\..*"]
    assert "weights 8-bit" in rows["features.0"]
    assert "weights 6-bit" in rows["features.3.squeeze"]
    assert "This network has 26 conv (features.0, features.3.squeeze, ...)" in text


@pytest.mark.parametrize("args", [(), ("-a", "resnet20"), ("-a", "resnet18", "--num-classes", "7")])
def test_every_option_in_a_comment_is_at_its_default(args, init):
    text = init(*args)
    shown = yaml.safe_load(uncommented(text))
    for name in ALWAYS:
        keys = {key for key, _, described in options_of(SECTIONS[name]) if not described.layer_only}
        assert keys == set(shown[name]) - {"overrides"}
    assert shown["quantizers"].pop("overrides")
    Path("shown.yaml").write_text(yaml.safe_dump(shown))
    assert load_config(Path("shown.yaml")) == load_config(Path("qtool.yaml"))


def test_what_is_asked_for_is_set_and_not_in_a_comment(init):
    Path("images").mkdir()
    asked = {
        "path": Path("images"), "arch": "resnet20", "crop": 0, "mean": (0.5, 0.25, 1.0), "calib_samples": 9,
        "mode": "asym_u", "no_clip_layers": ("fc,linear", "conv1"), "per_channel_weights": True,
    }  # fmt: skip
    flags = (
        "images", "-a", "resnet20", "--crop", "0", "--mean", "0.5,0.25,1", "--calib-samples", "9",
        "--qem", "asym_u", "--qencl", "linear,conv1", "--qencl", "conv1", "--qepc",
    )  # fmt: skip
    init(*flags)
    wanted = load_config(None, **asked | {"no_clip_layers": ("linear,conv1", "conv1")})
    assert load_config(Path("qtool.yaml")) == wanted


def test_settings_of_another_file_are_taken_over(init):
    source = {
        "quantizers": {
            "post_train_quantizer": {
                "class": "PostTrainLinearQuantizer",
                "clip_acts": "AVG",
                "overrides": {"conv1": {"bits_weights": 4, "input_overrides": {0: {"clip_acts": "NONE"}}}},
            }
        },
        "lapq": {"enabled": True},
    }
    Path("other.yaml").write_text(yaml.safe_dump(source))
    text = init("-c", "other.yaml")
    assert load_config(Path("qtool.yaml")) == load_config(Path("other.yaml"))
    assert "#overrides" not in text


def test_paths_hold_from_the_folder_of_the_file(init, chdir_tmp):
    state = load_model("digits_resnet").model.state_dict()
    torch.save(state, "mine.pth")
    Path("images").mkdir()
    init("-a", "digits_resnet", "--checkpoint", "mine.pth", "images", "-o", "sub/folder/mine.yaml")
    found = load_config(Path("sub/folder/mine.yaml"))
    assert (found.model.checkpoint, found.data.path) == (chdir_tmp / "mine.pth", chdir_tmp / "images")


def test_network_of_a_file_is_found_from_another_folder(init, run_cli):
    Path("net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())\n"
    )
    text = init("-a", "net.py:make", "--input-shape", "3,8,8", "-o", "sub/mine.yaml")
    assert re.findall(r"#  (.*): {bits", text) == ["'0'"]
    assert load_config(Path("sub/mine.yaml")).model.arch == f"{Path('net.py').absolute()}:make"
    assert run_cli("layers", "-c", "sub/mine.yaml").exit_code == 0


def test_file_that_is_there_is_replaced_by_force_only(init, run_cli):
    Path("qtool.yaml").write_text("run: {seed: 7}")
    done = run_cli("init")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "error: qtool.yaml: is there already; name another file with -o, or replace it with --force"
    )
    assert Path("qtool.yaml").read_text() == "run: {seed: 7}"
    init("--force")
    assert load_config(Path("qtool.yaml")) == Config()  # the old one has no part in it


def test_hyphen_prints_the_file(init, chdir_tmp):
    assert yaml.safe_load(init("-o", "-", "-a", "resnet20"))["model"] == {"arch": "resnet20"}
    assert not list(chdir_tmp.iterdir())


def test_pretrained_network_needs_no_download(init, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    init("-a", "squeezenet1_1", "--pretrained", "--weights", "IMAGENET1K_V1")
    assert load_config(Path("qtool.yaml")) == load_config(
        arch="squeezenet1_1", pretrained=True, weights="IMAGENET1K_V1"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-a", "resnet_18"), "--arch: no network is called 'resnet_18'; did you mean 'resnet18'"),
        (("--qencl", "cnv1"), "--qe-no-clip-layers: pattern 'cnv1': matches no layer; did you mean 'conv1'"),
        (("--qeca", "n_std"), "--qe-clip-acts n_std: needs --qe-clip-n-stds, such as 3"),
        (("-o", "."), ".: is there already"),
        (
            ("-o", "/dev/full/x.yaml"),
            "/dev/full/x.yaml: cannot be written: no files can be made in /dev/full",
        ),
        (("-a", "resnet20", "nowhere"), "nowhere: no such file or folder; DATA names the evaluation images"),
        (("--checkpoint", "none.pth", "-a", "resnet20"), "none.pth: no such file; correct --checkpoint"),
    ],
)
def test_file_that_would_not_run_is_not_written(args, message, run_cli, chdir_tmp):
    done = run_cli("init", *args)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not list(chdir_tmp.iterdir())


def test_file_fits_the_schema_that_it_names(init, run_cli):
    text = init("-a", "resnet20", "--qem", "asym_u")
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, flags=re.MULTILINE)
    schema = Path(unquote(urlparse(named).path)).read_text()
    assert run_cli("schema").stdout == schema
    jsonschema.Draft202012Validator(json.loads(schema)).validate(yaml.safe_load(text))
    jsonschema.Draft202012Validator(json.loads(schema)).validate(yaml.safe_load(uncommented(text)))


def test_schema_of_a_gate_is_printed(run_cli):
    assert "runs" in json.loads(run_cli("schema", "check").stdout)["properties"]
