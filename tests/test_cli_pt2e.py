"""qtool export --format pt2e, from the command line to the file and back."""

import json
from pathlib import Path

import pytest

SMALL = ("--effective-test-size", "0.05", "-j", "0")
SYMMETRIC = ("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel")


@pytest.fixture
def run(run_cli):
    """Run a command that must end well: stdout, its results, its folder."""

    def run(*args: object):
        done = run_cli(*args)
        assert done.exit_code == 0, done.output
        folder = Path(done.stdout.splitlines()[-1])
        return done.stdout, json.loads((folder / "results.json").read_text()), folder

    return run


@pytest.fixture
def checkpoint(run):
    folder = run("quantize", *SYMMETRIC, "--qe-bits-wts", 4, "--calib-samples", 16, *SMALL)[-1]
    return folder / "quantized_checkpoint.pth.tar"


def test_the_program_is_compared_and_evaluated(checkpoint, run):
    stdout, found, folder = run(
        "export", "--format", "pt2e", "--checkpoint", checkpoint, "--verify", 60, "-j", "0"
    )
    assert found["quantized"]["images"] == found["pt2e"]["images"] == 60
    assert found["agreement"] >= 98 and abs(found["top1_difference"]) <= 2
    assert found["export"]["layers"]["conv1"]["bits_weights"] == 4
    assert found["layers"]["conv1"]["equal"] >= 0.999 and "integers of" in stdout
    assert "qtool and torch.export on the first 60 of 537 images" in stdout
    again = run("evaluate", "--checkpoint", folder / "quantized.pt2", *SMALL)[1]
    ours = run("evaluate", "--checkpoint", checkpoint, *SMALL)[1]
    assert again["pt2e"]["top1"] == ours["quantized"]["top1"]


def refused(done, message):
    assert done.exit_code == 1, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr


def test_what_cannot_be_had_is_refused_before_anything_is_written(checkpoint, run_cli, monkeypatch):
    before = sorted(Path("logs").iterdir())
    given = ("export", "--format", "pt2e", "--checkpoint", checkpoint)
    refused(run_cli(*given, "--opset", 19), "--opset: is of --format onnx and onnx-float")
    refused(run_cli(*given, "--lower"), "--lower: what is compiled is compared, not written; add DATA or")
    refused(run_cli("export", "--lower", "--verify", 3), "--lower: is of --format pt2e")
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    done = run_cli(*given, "--lower", "--verify", 3)
    refused(done, "--lower: needs torchao, which is not installed; pip install 'qtool[pt2e]'")
    refused(run_cli("export", "--format", "pt2e"), "is float; 'qtool quantize' makes a quantized_checkpoint")
    assert sorted(Path("logs").iterdir()) == before
