"""--qe-convert-pytorch, from the command line to the file, and back."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from qtool.deploy.native import BACKENDS, supported_backends

SMALL = ("--effective-test-size", "0.05", "--calib-samples", "16", "-j", "0")
SYMMETRIC = ("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel")


@pytest.fixture
def converted(run_cli):
    """Run `qtool quantize --qe-convert-pytorch` on 26 digits: stdout, stderr, and the folder."""

    def run(*args: object):
        done = run_cli("quantize", "--evaluate", "--qe", "--qept", *args, *SMALL)
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr, Path(done.stdout.splitlines()[-1])

    return run


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("backend", supported_backends())
def test_the_converted_network_is_evaluated_saved_and_described(backend, converted):
    stdout, _, folder = converted("--qe-pytorch-backend", backend, *SYMMETRIC)
    found = results(folder)
    assert found["native"]["top1"] == found["quantized"]["top1"]
    assert found["conversion"]["backend"] == backend
    assert found["conversion"]["agreement_with_simulation"] == 100
    layers = yaml.safe_load((folder / "native_layers.yaml").read_text())
    assert found["conversion"]["layers"] == len(layers)
    count = sum(entry["runs"] == "int8 kernel" for entry in layers.values())
    assert found["conversion"]["int8_layers"] == count >= 10
    assert layers["avgpool"]["runs"] == "float" and "why" in layers["avgpool"]
    assert f"{backend}: {count} of {len(layers)} layers on int8 kernels; 100.000 % of predictions" in stdout
    assert "not: avgpool, adaptive_avg_pool2d, in float (" in stdout
    assert [line.split()[0] for line in stdout.splitlines()[2:5]] == ["float", "quantized", "native"]


def test_the_saved_file_is_evaluated_as_it_is(converted, run_cli):
    _, _, folder = converted("-n", "mine", *SYMMETRIC)
    path = folder / "mine_native_int8.pt"
    done = run_cli("evaluate", "--checkpoint", path, "--effective-test-size", "0.05", "-j", "0")
    assert done.exit_code == 0, done.output
    again = results(Path(done.stdout.splitlines()[-1]))
    before = results(folder)
    assert {k: again["native"][k] for k in ("top1", "loss")} == {
        k: before["native"][k] for k in ("top1", "loss")
    }


def test_a_saved_quantized_model_is_converted_by_evaluate(converted, run_cli):
    _, _, folder = converted(*SYMMETRIC)
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    args = ("--effective-test-size", "0.05", "-j", "0", "--qept")
    done = run_cli("evaluate", "--checkpoint", checkpoint, *args)
    assert done.exit_code == 0, done.output
    again = Path(done.stdout.splitlines()[-1])
    assert results(again)["native"]["loss"] == results(folder)["native"]["loss"]
    assert (again / "native_int8.pt").is_file()


def test_reduced_ranges_are_those_of_the_simulation_too(converted):
    _, log, folder = converted("--qe-reduce-range", *SYMMETRIC)
    assert "--qe-reduce-range: 7 bits for " in log
    assert "could saturate" not in log
    params = yaml.safe_load((folder / "layer_quant_params.yaml").read_text())
    bits = {entry["bits_activations"] for entry in params.values() if entry["computes"] == "integer"}
    assert 7 in bits
    layers = yaml.safe_load((folder / "native_layers.yaml").read_text())
    assert not any("channels_that_need_vnni" in entry for entry in layers.values())
    assert results(folder)["conversion"]["agreement_with_simulation"] == 100


def test_what_could_saturate_elsewhere_is_said(converted):
    _, log, folder = converted(*SYMMETRIC)
    assert "on processors without VNNI, sums of " in log
    layers = yaml.safe_load((folder / "native_layers.yaml").read_text())
    assert any(entry.get("channels_that_need_vnni") for entry in layers.values())


def test_the_settings_of_a_run_repeat_the_conversion(converted, run_cli):
    _, _, folder = converted("--qe-pytorch-backend", "fbgemm", *SYMMETRIC)
    done = run_cli("quantize", "-c", folder / "config.yaml")
    assert done.exit_code == 0, done.output
    again = results(Path(done.stdout.splitlines()[-1]))
    assert again["conversion"] == results(folder)["conversion"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--qept", "--qe-dynamic"),
            "--qe-convert-pytorch: int8 kernels need grids that are known beforehand",
        ),
        (("--qept", "--qe-bits-acts", "0"), "no layer would run on an int8 kernel; layer 'conv1': only its"),
        (
            ("--qept", "--qe-bits-acts", "16"),
            "layer 'conv1': its output has 16 bits; --qe-bits-acts 8 or fewer",
        ),
        (
            ("--qe-pytorch-backend", "fbgemm"),
            "--qe-pytorch-backend: has an effect with --qe-convert-pytorch only",
        ),
        (("--qe-reduce-range",), "--qe-reduce-range: has an effect with --qe-convert-pytorch only"),
        (("--qept", "--device", "cuda:0"), "torch's int8 kernels run on the CPU, not on cuda:0"),
    ],
)
def test_what_cannot_be_converted_is_refused(run_cli, args, message):
    done = run_cli("quantize", *args, *SMALL)
    assert done.exit_code == 1
    assert message in done.stderr and len([x for x in done.stderr.splitlines() if "error:" in x]) == 1
    assert not list(Path().rglob("native_int8.pt"))


def test_an_engine_that_this_build_lacks_is_refused_before_any_work(run_cli, monkeypatch):
    monkeypatch.setattr("qtool.deploy.native.target.supported_backends", lambda: ["qnnpack"])
    done = run_cli("quantize", "--qept", *SMALL)
    assert done.exit_code == 1
    assert "this build of torch lacks 'x86'; it has qnnpack" in done.stderr
    assert not Path("logs").exists()
    assert run_cli("quantize", "--qept", "--qe-pytorch-backend", "tpu").exit_code == 2


def test_evaluate_converts_quantized_networks_only(converted, run_cli):
    done = run_cli("evaluate", "--qept")
    assert done.exit_code == 1 and "is float; 'qtool evaluate' converts a quantized model" in done.stderr
    _, _, folder = converted(*SYMMETRIC)
    for command, args, message in [
        ("evaluate", ("--qept",), "is native; 'qtool evaluate' converts a quantized model"),
        ("evaluate", ("-a", "resnet18"), "is a converted digits_resnet, not resnet18"),
        ("quantize", (), "is quantized already"),
        ("layers", (), "is quantized already"),
    ]:
        done = run_cli(command, "--checkpoint", folder / "native_int8.pt", *args)
        assert done.exit_code == 1 and message in done.stderr, done.output


def test_a_gate_and_a_search_refuse_the_section(run_cli):
    Path("gate.yaml").write_text(
        "runs:\n- name: a\n  conversion: {convert_pytorch: true}\n  expect: {top1_min: 9}\n"
    )
    done = run_cli("check", "gate.yaml")
    assert done.exit_code == 1 and "a gate judges the simulation and converts nothing" in done.stderr
    Path("search.yaml").write_text("conversion: {convert_pytorch: true}\n")
    done = run_cli("search-clipping", "-c", "search.yaml")
    assert done.exit_code == 1 and "is of 'qtool quantize', not of this search" in done.stderr


def test_a_program_that_is_not_qtools_is_refused(run_cli):
    with pytest.warns(FutureWarning):
        torch.jit.script(torch.nn.Linear(2, 2)).save("other.pt")
    done = run_cli("evaluate", "-a", "resnet20", "--checkpoint", "other.pt")
    assert done.exit_code == 1 and "is a TorchScript program" in done.stderr


def test_every_engine_has_a_name_on_the_command_line(run_cli):
    text = run_cli("quantize", "--help").stdout
    assert "--qept" in text and all(name in text for name in BACKENDS)
