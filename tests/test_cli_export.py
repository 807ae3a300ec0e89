"""qtool export and qtool bench, from the command line to the files."""

import json
from pathlib import Path

import pytest

from qtool.deploy.native.target import has_vnni

for extra in ("onnx", "onnxruntime"):
    pytest.importorskip(extra, reason="needs the extra: pip install 'qtool[onnx]'")

SMALL = ("--effective-test-size", "0.05", "--calib-samples", "16", "-j", "0")
SYMMETRIC = ("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel")


@pytest.fixture
def run(run_cli):
    """Run a command that must end well: stdout, stderr, its results, its folder."""

    def run(*args: object):
        done = run_cli(*args)
        assert done.exit_code == 0, done.output
        folder = Path(done.stdout.splitlines()[-1])
        return done.stdout, done.stderr, json.loads((folder / "results.json").read_text()), folder

    return run


@pytest.fixture
def quantized(run):
    """The quantized checkpoint of the embedded network."""

    def make(*args: object) -> Path:
        sizes = SMALL[:2] + SMALL[4:] if "--qe-dynamic" in args else SMALL
        return run("quantize", *SYMMETRIC, *args, *sizes)[-1] / "quantized_checkpoint.pth.tar"

    return make


def assert_same(found):
    """Every integer and logit is the same, where onnxruntime's kernels cannot saturate."""
    if has_vnni():
        assert found["agreement"] == 100 and found["top1_difference"] == 0
        assert found["logit_sqnr_db"] is None  # without noise there is no ratio to it
        assert {layer["equal"] for layer in found["layers"].values()} == {1.0}
    else:
        assert found["agreement"] >= 95 and found["layers"]["conv1"]["equal"] >= 0.999


@pytest.mark.parametrize("bits", [4, 8])
def test_the_exported_network_is_compared_and_evaluated(bits, quantized, run):
    checkpoint = quantized("--qe-bits-acts", bits, "--qe-bits-wts", bits)
    stdout, _, found, folder = run("export", "--checkpoint", checkpoint, "--verify", 100, "-j", "0")
    assert found["quantized"]["images"] == found["onnx"]["images"] == 100
    assert_same(found)
    assert found["export"]["layers"]["conv1"]["bits_weights"] == bits
    assert "qtool and onnxruntime on the first 100 of 537 images" in stdout and "integers of" in stdout
    again = run("evaluate", "--checkpoint", folder / "quantized.onnx", *SMALL[:2], "-j", "0")[2]
    ours = run("evaluate", "--checkpoint", checkpoint, *SMALL[:2], "-j", "0")[2]
    assert again["onnx"]["top1"] == ours["quantized"]["top1"]


def test_the_float_network_is_exported_and_compared(run):
    _, _, found, folder = run("export", "--format", "onnx-float", "--verify", 50, "-n", "mine", "-j", "0")
    assert found["agreement"] == 100 and found["logit_sqnr_db"] > 80
    assert (folder / "mine_float.onnx").is_file()


def test_encodings_are_written_without_the_extra(quantized, run, monkeypatch):
    checkpoint = quantized()
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    _, _, found, folder = run("export", "--checkpoint", checkpoint, "--format", "encodings")
    content = json.loads((folder / "encodings.json").read_text())
    assert len(content["activation_encodings"]) == found["export"]["activation_encodings"] > 10
    assert len(content["param_encodings"]["conv1.weight"]) == 16


def test_a_changed_file_is_evaluated_with_a_warning(quantized, run):
    import onnx

    path = run("export", "--checkpoint", quantized())[-1] / "quantized.onnx"
    proto = onnx.load(path)
    proto.graph.name = "changed"
    onnx.save(proto, path)
    _, log, found, _ = run("evaluate", "--checkpoint", path, *SMALL[:2], "-j", "0")
    assert "quantized.onnx: has been changed since qtool wrote it" in log
    assert found["onnx"]["images"] == 26


def refused(done, message):
    assert done.exit_code == 1, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(quantized, run_cli):
    checkpoint = quantized()
    dynamic = quantized("--qe-dynamic")
    before = sorted(Path("logs").iterdir())
    given = ("export", "--checkpoint", checkpoint)
    refused(run_cli("export", "--checkpoint", dynamic), "--qe-dynamic finds them batch by batch")
    refused(run_cli("export", "--checkpoint", dynamic, "--format", "encodings"), "there are none to write")
    refused(run_cli("export"), "--format onnx: qtool's own digits_resnet weights is float; 'qtool quantize'")
    refused(run_cli(*given, "--format", "onnx-float"), "is a quantized network; give the float weights")
    refused(run_cli(*given, "--format", "encodings", "--verify", 3), "--verify: grids alone compute nothing")
    refused(run_cli(*given, "--format", "encodings", "--opset", 19), "--opset: is of --format onnx")
    assert run_cli(*given, "--opset", 12).exit_code == 2
    assert sorted(Path("logs").iterdir()) == before


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_refused_with_the_pip_command(module, quantized, run_cli, monkeypatch):
    checkpoint = quantized()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    done = run_cli("export", "--checkpoint", checkpoint, "--verify", 5)
    refused(done, f"needs {module}, which is not installed; pip install 'qtool[onnx]'")


def test_bench_measures_every_form_beside_the_float_network(run):
    stdout, _, found, _ = run("bench", *SYMMETRIC, "--batch-sizes", "1,2", "--threads", 1, "--seconds", 1)
    forms = ["float eager", "float folded", "simulated", "int8 engine", "native file"]
    forms += ["onnxruntime float", "onnxruntime int8"]
    assert [row["form"] for row in found["bench"]] == forms * 2
    assert [row["batch_size"] for row in found["bench"]] == [1] * 7 + [2] * 7
    assert found["bench"][0]["ratio"] == 1 and found["missing"] == []
    assert all(row["rounds"] >= 3 and row["p90_ms"] >= row["median_ms"] > 0 for row in found["bench"])
    sizes = {row["form"]: row["size_bytes"] for row in found["bench"]}
    assert sizes["onnxruntime int8"] < sizes["onnxruntime float"]
    assert "threads 1, batch 2" in stdout


def test_bench_of_a_quantized_checkpoint_says_that_float_is_missing(quantized, run):
    _, _, found, _ = run("bench", "--checkpoint", quantized(), "--batch-sizes", 1, "--seconds", 1)
    assert [row["form"] for row in found["bench"]][:2] == ["simulated", "int8 engine"]
    assert found["missing"] == ["no float forms: a quantized checkpoint has no float weights"]


def test_bench_without_the_extra_says_how_to_have_it(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    stdout, _, found, _ = run("bench", "--batch-sizes", 1, "--seconds", 1)
    assert "no onnxruntime int8: pip install 'qtool[onnx]'" in stdout
    assert not any("onnxruntime" in row["form"] for row in found["bench"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--threads", 4096), "--threads: 4096 asked for, and this machine has"),
        (("--qe-stats-file", "a.yaml"), "--qe-stats-file: the speed does not depend on ranges"),
        (("--device", "cuda:0"), "--device"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message, run_cli):
    refused(run_cli("bench", *args), message)


def test_a_batch_of_no_images_is_wrong_usage(run_cli):
    assert run_cli("bench", "--batch-sizes", "0,4").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1"])
def test_a_trained_network_gives_the_same_predictions_in_onnxruntime(arch, run, shared_data):
    images = ("--classes", shared_data / "imagenet-classes.txt", "-j", "0", shared_data / "imagenet-nips2017")
    weights = ("-a", arch, "--checkpoint", shared_data / "weights" / f"{arch}.pth")
    calibration = ("--calib-data", shared_data / "imagenet-sample", "--calib-samples", "8")
    asked = ("--effective-test-size", "0.002", "--skip-float")
    folder = run("quantize", *weights, *SYMMETRIC, *calibration, *asked, *images)[-1]
    checkpoint = folder / "quantized_checkpoint.pth.tar"
    _, _, found, _ = run("export", "--checkpoint", checkpoint, "--verify", 24, *images)
    assert found["onnx"]["images"] == 24 and found["quantized"]["top1"] >= 40
    assert_same(found)
