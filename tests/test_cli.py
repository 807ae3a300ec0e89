"""The command line itself: help, spellings, usage errors, and what goes to which stream."""

import os
import re
import subprocess
import sys

import click
import pytest

from qtool.cli import main

COMMANDS = ("calibrate", "quantize", "evaluate", "layers")
QUICK = ("--effective-test-size", "0.05", "--calib-samples", "8", "--workers", "0")

SPELLINGS = [
    ("--qe-mode", "--qem", "asym_s"),
    ("--qe-mode-acts", "--qema", "asym_u"),
    ("--qe-mode-wts", "--qemw", "sym_restr"),
    ("--qe-bits-acts", "--qeba", "6"),
    ("--qe-bits-wts", "--qebw", "4"),
    ("--qe-clip-acts", "--qeca", "avg"),
    ("--qe-no-clip-layers", "--qencl", "fc"),
    ("--qe-no-quant-layers", "--qenql", "conv1"),
    ("--qe-scale-approx-bits", "--qesab", "8"),
    ("--arch", "-a", "resnet18"),
    ("--batch-size", "-b", "5"),
    ("--workers", "-j", "0"),
    ("--out-dir", "-o", "elsewhere"),
    ("--name", "-n", "trial"),
    ("--config", "-c", "a.yaml"),
]

# Prints a command's help, and then whether that has imported torch.
HELP_SCRIPT = """
import sys
from qtool.cli import main
main(sys.argv[1:], prog_name="qtool", standalone_mode=False)
print("torch" in sys.modules, "torchvision" in sys.modules, "scipy" in sys.modules)
"""


def parsed(*args: str) -> dict[str, object]:
    """The values that quantize takes from its arguments, without the options that were not given."""
    params = main.commands["quantize"].make_context("quantize", list(args)).params
    return {name: value for name, value in params.items() if value not in (None, ()) and value is not False}


def python(*args: str, **streams: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], text=True, timeout=60, **streams)


@pytest.mark.parametrize(("long", "short", "value"), SPELLINGS)
def test_short_spelling_means_the_long_one(long, short, value):
    assert parsed(short, value) == parsed(long, value)
    assert len(parsed(short, value)) == 1


def test_per_channel_flag_has_a_short_spelling():
    assert parsed("--qepc") == parsed("--qe-per-channel") == {"per_channel_weights": True}


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in COMMANDS)], ids=lambda c: " ".join(c) or "qtool"
)
def test_help_shows_an_example_without_importing_torch(command):
    done = python("-c", HELP_SCRIPT, *command, "--help", capture_output=True)
    *text, imported = done.stdout.splitlines()
    assert imported == "False False False", done.stderr
    assert any(line.strip().startswith(" ".join(["qtool", *command])) for line in text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default(command, run_cli):
    text = " ".join(run_cli(command, "--help").stdout.split())
    without = []
    for option in main.commands[command].params:
        if isinstance(option, click.Option) and option.show_default:
            without += [] if f"[default: {option.show_default}" in text else [option.opts[0]]
    assert not without
    assert "[default: logs" in text or command == "layers"


def test_help_shows_that_the_seed_is_zero(run_cli):
    described = " ".join(run_cli("calibrate", "--help").stdout.split())
    assert re.search(r"--seed [^\[]*\[default: 0[;\]]", described)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--qe-bits-wts", "1"], "'--qe-bits-wts' / '--qebw': 1 is not 0 (float) or in the range 2<=x<=16."),
        (["--qeba", "40"], "'--qe-bits-acts' / '--qeba': 40 is not 0 (float) or in the range 2<=x<=16."),
        (["--qe-mode", "asym"], "'asym' is not one of 'sym', 'sym_restr', 'asym_s', 'asym_u'."),
        (["--fraction", "1.5"], "1.5 is not in the range 0<x<=1."),
        (["--fraction", "nan"], "nan is not in the range 0<x<=1."),
        (["--batch-size", "0"], "0 is not in the range x>=1."),
        (["--input-shape", "3x8"], "'3x8' is not channels, height and width, such as 3,224,224."),
        (["--qe-bits-wt", "4"], "No such option '--qe-bits-wt'"),
        (["data", "more"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(args, message, run_cli, tmp_path):
    result = run_cli("quantize", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not any(tmp_path.iterdir())


def test_unknown_command_is_exit_code_2(run_cli):
    result = run_cli("quantise")
    assert result.exit_code == 2
    assert "No such command 'quantise'" in result.stderr


def test_module_runs_as_the_script_does():
    done = python("-m", "qtool", "--version", capture_output=True)
    assert done.returncode == 0
    assert re.fullmatch(r"qtool, version \d+\.\d+\.\d+\n", done.stdout)


def test_layers_names_every_layer_and_what_becomes_of_it(run_cli):
    result = run_cli("layers", "--qebw", "4", "--qepc", "--qenql", "fc")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert result.exit_code == 0
    assert rows["conv1"] == "conv 16x8x8 weights 4-bit sym per channel, output 8-bit sym"
    assert rows["bn1"].endswith("folded into conv1")
    assert rows["relu"].endswith("computed by conv1")
    assert rows["layer1.add"].startswith("add 16x8x8 output 8-bit sym")
    assert rows["fc"].startswith("linear 10 float")
    assert {"layer2.downsample.0", "depthwise.3", "avgpool"} <= rows.keys()


def test_results_go_to_stdout_and_the_rest_to_stderr(run_cli):
    result = run_cli("quantize", *QUICK)
    assert result.exit_code == 0
    assert re.fullmatch(
        r"digits_resnet, 26 of 537 images of digits test\n"
        r" +top-1 +top-5 +loss +images +images/s\n"
        r"float .*\nquantized .*\ndifference .*\nagreement .*\nlogs/[^\n]+\n",
        result.stdout,
    )
    assert result.stderr.splitlines()[0] == (
        "no model or data named: using the embedded digits_resnet and UCI handwritten digits"
    )
    assert "calibrating on 8 of 360 images" in result.stderr


def test_named_network_is_not_announced_as_the_default(run_cli):
    assert "no model" not in run_cli("layers", "-a", "digits_resnet").stderr
    assert run_cli("layers").stderr == "no model named: using the embedded digits_resnet\n"


def test_closed_pipe_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = python("-m", "qtool", "layers", "-a", "digits_resnet", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_file_name_that_stdout_cannot_show_is_escaped(tmp_path):
    folder = tmp_path / "l\udcffgs"
    env = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    args = ("-m", "qtool", "calibrate", *QUICK, "-o", os.fspath(folder))
    done = python(*args, env=env, capture_output=True)
    assert done.returncode == 0
    assert "l\\udcffgs/" in done.stdout
    assert "Traceback" not in done.stderr
    (log,) = folder.glob("*/*.log")
    assert "l\\udcffgs/" in log.read_text(encoding="utf-8")


def test_d10_layers_shows_where_grids_are_unsigned(run_cli):
    lines = run_cli("layers", "--qe-sym-unsigned").stdout.splitlines()
    shown = {line.split()[0]: line for line in lines if "output" in line}
    assert "output 8-bit sym_u" in shown["conv1"]  # a ReLU follows
    assert "output 8-bit sym " in shown["fc"] + " "
