"""--engine and --verify, from the command line to results.json."""

import json
from pathlib import Path

import pytest
import yaml

from qtool.deploy.native import NativeModel
from qtool.deploy.native.target import has_vnni

SMALL = ("--effective-test-size", "0.05", "--calib-samples", "16", "-j", "0")
SYMMETRIC = ("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel", "--qe-bits-acts", "6")


@pytest.fixture
def run(run_cli):
    """Run a command: what it printed, what it logged, results.json and the folder."""

    def run(*args: object):
        done = run_cli(*args)
        assert done.exit_code == 0, done.output
        folder = Path(done.stdout.splitlines()[-1])
        return done.stdout, done.stderr, json.loads((folder / "results.json").read_text()), folder

    return run


def test_the_default_is_the_simulation(run):
    stdout, _, results, folder = run("quantize", *SMALL, *SYMMETRIC)
    assert results["engine"] == {"asked": "simulate", "taken": "simulate"}
    assert "engine" not in stdout and not (folder / "native_layers.yaml").exists()


def test_int8_kernels_evaluate_and_are_compared_layer_by_layer(run):
    _, _, simulated, _ = run("quantize", *SMALL, *SYMMETRIC)
    stdout, _, results, folder = run("quantize", *SMALL, *SYMMETRIC, "--engine", "int8", "--verify", "5")
    engine, parity = results["engine"], results["parity"]
    assert engine["taken"] == "int8" and engine["share_of_macs"] == 1
    layers = yaml.safe_load((folder / "native_layers.yaml").read_text())
    assert engine["int8_layers"] == sum(layer["runs"] == "int8 kernel" for layer in layers.values()) >= 10
    assert f"engine int8, {engine['backend']}: {engine['int8_layers']} of {len(layers)} layers" in stdout
    assert "not: avgpool, adaptive_avg_pool2d, in float (" in stdout
    assert parity["images"] == 5 and parity["equal_predictions"] == 5
    assert "int8 kernels against the simulation on 5 images: 5 predictions equal" in stdout
    table = yaml.safe_load((folder / "parity.yaml").read_text())
    assert table.keys() == layers.keys()
    assert max(layer["in_network"]["largest"] for layer in table.values()) == parity["largest_difference"]
    assert results["quantized"]["top1"] == simulated["quantized"]["top1"]


def test_the_engine_is_what_is_evaluated(run, monkeypatch):
    forward = NativeModel.forward
    monkeypatch.setattr(NativeModel, "forward", lambda self, x: -forward(self, x))
    _, _, results, _ = run("quantize", *SMALL, *SYMMETRIC, "--engine", "int8")
    assert results["float"]["top1"] > 90 and results["quantized"]["top1"] < 10


def test_the_arithmetic_of_onnxruntime_is_what_an_export_gives(run):
    pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'qtool[onnx]'")
    onnx = ("--arithmetic", "onnxruntime")
    stdout, _, results, folder = run("quantize", *SMALL, *SYMMETRIC, *onnx, "--qe-bits-acts", "8")
    assert results["engine"]["arithmetic"] == "onnxruntime" and results["engine"]["taken"] == "simulate"
    assert "engine simulate: in onnxruntime's arithmetic" in stdout
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    stdout, _, exported, folder = run("export", "--checkpoint", checkpoint, "--verify", 100, "-j", "0")
    if has_vnni():
        assert exported["agreement"] == 100 and exported["logit_sqnr_db"] is None
        assert {layer["largest"] for layer in exported["layers"].values()} == {0}
    assert "qtool's simulation in onnxruntime's arithmetic, as --arithmetic onnxruntime evaluates" in stdout
    again = run("evaluate", "--checkpoint", folder / "quantized.onnx", *SMALL[:2], "-j", "0")[2]
    ours = run("evaluate", "--checkpoint", checkpoint, *SMALL[:2], "-j", "0", *onnx)[2]
    if has_vnni():
        assert again["onnx"]["loss"] == pytest.approx(ours["quantized"]["loss"], rel=1e-9)
    assert ours["quantized"]["loss"] == results["quantized"]["loss"]


def test_auto_says_what_it_took(run):
    stdout, stderr, results, folder = run("quantize", *SMALL, *SYMMETRIC, "--engine", "auto")
    assert results["engine"]["taken"] == "int8" and results["engine"]["asked"] == "auto"
    assert "engine: int8 (int8 kernels do 100.0 % of the multiply-accumulates" in stderr
    again = run(
        "evaluate", "--checkpoint", folder / "quantized_checkpoint.pth.tar", *SMALL[:2], "--engine", "auto"
    )
    assert again[2]["engine"]["taken"] == "int8"
    assert again[2]["quantized"]["loss"] == results["quantized"]["loss"]
    args = ("--engine", "auto", "--verify", "3", "--qe-bits-acts", "12")
    stdout, _, results, folder = run("quantize", *SMALL, *args)
    assert results["engine"]["taken"] == "simulate" and "its output has 12 bits" in results["engine"]["why"]
    assert "engine simulate: no layer would run on an int8 kernel" in stdout
    assert "--verify: nothing to compare" in stdout and not (folder / "native_layers.yaml").exists()


def test_dynamic_mode_is_simulated_by_auto(run):
    _, _, results, _ = run("quantize", "--qe-dynamic", "--engine", "auto", *SMALL[:2], "-j", "0")
    assert results["engine"]["taken"] == "simulate"


def test_a_conversion_is_compared_too(run):
    stdout, _, results, folder = run("quantize", *SMALL, *SYMMETRIC, "--qept", "--verify", "2")
    assert results["engine"]["taken"] == "simulate" and results["parity"]["images"] == 2
    assert "against the simulation on 2 images" in stdout and (folder / "parity.yaml").is_file()


def test_a_compile_that_fails_is_said_in_one_line(run, monkeypatch):
    import torch

    def fail(program):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", fail)
    stdout, stderr, results, _ = run("quantize", *SMALL, *SYMMETRIC, "--compile")
    assert results["engine"]["taken"] == "simulate" and results["engine"]["compiled"] is False
    line = "not compiled: no C++ compiler that works was found; install one, such as g++, or name it in CXX"
    assert line in stderr and f"engine simulate: {line}" in stdout


def test_what_was_compiled_is_what_is_evaluated(run, monkeypatch):
    import torch

    from qtool.deploy.compiled import CompiledModel

    monkeypatch.setattr(torch, "compile", lambda program: program)
    seen = []
    forward = CompiledModel.forward
    monkeypatch.setattr(CompiledModel, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    stdout, _, results, folder = run("quantize", *SMALL, *SYMMETRIC, "--compile")
    assert results["engine"] == {"asked": "simulate", "taken": "simulate", "compiled": True}
    assert len(seen) == 2 and "engine simulate: compiled" in stdout  # tried out, and evaluated
    plain = run("evaluate", "--checkpoint", folder / "quantized_checkpoint.pth.tar", *SMALL[:2])[2]
    assert plain["quantized"]["loss"] == results["quantized"]["loss"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--engine", "int8", "--compile"), "--compile: compiles the simulation, and --engine int8 runs"),
        (("--engine", "int8", "--qept"), "--engine int8: --qe-convert-pytorch evaluates int8 kernels beside"),
        (
            ("--arithmetic", "onnxruntime", "--engine", "auto"),
            "--arithmetic onnxruntime: is of the simulation",
        ),
        (
            ("--arithmetic", "onnxruntime", "--qept"),
            "--arithmetic onnxruntime: is of the simulation, and --qe",
        ),
        (("--arithmetic", "onnxruntime", "--qe-dynamic"), "--arithmetic onnxruntime: is that of grids known"),
        (("--verify", "3"), "--verify: compares int8 kernels with the simulation, and only the simulation"),
        (("--engine", "int8", "--qe-dynamic"), "--engine int8: int8 kernels need grids that are known"),
        (("--engine", "int8", "--device", "cuda:0"), "--engine int8: torch's int8 kernels run on the CPU"),
        (("--engine", "int8", "--qe-bits-acts", "16"), "--engine int8: no layer would run on an int8 kernel"),
    ],
)
def test_what_cannot_be_had_is_refused(args, message, run_cli):
    done = run_cli("quantize", *args, *SMALL)
    assert done.exit_code == 1 and f"error: {message}" in done.stderr
    assert not list(Path().rglob("results.json"))


def test_only_quantized_networks_have_an_engine(run_cli):
    done = run_cli("evaluate", "--engine", "auto", *SMALL[:2])
    assert done.exit_code == 1 and "--engine auto: qtool's own digits_resnet weights is float" in done.stderr
    done = run_cli("evaluate", "--arithmetic", "onnxruntime", *SMALL[:2])
    assert (
        done.exit_code == 1 and "--arithmetic onnxruntime: qtool's own digits_resnet weights" in done.stderr
    )
    assert run_cli("quantize", "--engine", "fast").exit_code == 2


def test_a_gate_and_a_search_refuse_the_section(run_cli):
    Path("gate.yaml").write_text("runs:\n- name: a\n  evaluation: {engine: int8}\n  expect: {top1_min: 9}\n")
    done = run_cli("check", "gate.yaml")
    assert done.exit_code == 1 and "--engine: a gate judges the simulation" in done.stderr
    Path("search.yaml").write_text("evaluation: {engine: int8}\n")
    done = run_cli("search-clipping", "-c", "search.yaml")
    assert done.exit_code == 1 and "is of 'qtool quantize', not of this search" in done.stderr
