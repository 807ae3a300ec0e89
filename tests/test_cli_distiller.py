"""Command lines as Distiller's users have them, on the embedded network."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from qtool.cli import main
from qtool.models import load_model

SMALL = ("--effective-test-size", "0.05", "-j", "0")
SOURCES = {
    "--qe-stats-file": ("--qe-stats-file", "s.yaml"),
    "--qe-dynamic": ("--qe-dynamic",),
    "--qe-calibration": ("--qe-calibration", "0.1"),
    "--qe-config-file": ("--qe-config-file", "q.yaml"),
}
QUANTIZER = """
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 6
    bits_parameters: 5
    mode: {activations: ASYMMETRIC_UNSIGNED, weights: SYMMETRIC}
    model_activation_stats: ../no/such/folder/acts_quantization_stats.yaml
    per_channel_wts: True
    clip_acts: AVG
    inputs_quant_auto_fallback: False
    overrides:
      conv1:
        input_overrides:
          0: {from_output: True}
      .*add: {bits_activations: 8}
      fc:
        clip_acts: NONE
        bits_weights: 8
        input_overrides:
          0: {clip_acts: AVG}
"""


@pytest.fixture
def quantize(run_cli):
    """Run `qtool quantize` on 26 digits, which must end well: its results, folder and log."""

    def quantize(*args: object) -> tuple[dict, Path, str]:
        result = run_cli("quantize", *args, *SMALL)
        assert result.exit_code == 0, result.output
        folder = Path(result.stdout.splitlines()[-1])
        return json.loads((folder / "results.json").read_text()), folder, result.stderr

    return quantize


@pytest.fixture
def deterministic_as_before():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def measured(run_cli) -> Path:
    """Statistics of eight digits."""
    done = run_cli("calibrate", "--calib-samples", "8", "-j", "0", "-o", "measured")
    return Path(done.stdout.splitlines()[-1])


def parsed(*args: str) -> dict[str, object]:
    params = main.commands["quantize"].make_context("quantize", list(args)).params
    return {name: value for name, value in params.items() if value not in (None, ()) and value is not False}


def settings(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())["quantizers"]


# Flags of Distiller's command line


@pytest.mark.parametrize("flags", [("--evaluate", "--quantize-eval"), ("-e", "--qe"), ()])
def test_the_flags_that_ask_for_quantization_are_accepted(flags, quantize):
    """E1: --qe without --evaluate started training."""
    record, folder, _ = quantize(*flags, "--calib-samples", "8")
    assert record["quantized"]["images"] == 26
    assert (folder / "quantized_checkpoint.pth.tar").exists()


def test_calibration_alone_writes_the_statistics_and_ends(run_cli, chdir_tmp):
    done = run_cli("quantize", "--qe-calibration", "0.1", "-j", "0")
    assert done.exit_code == 0
    first, path = done.stdout.splitlines()
    assert first.endswith("layers of digits_resnet on 53 of 537 images of digits test (seed 0)")
    assert "conv1" in yaml.safe_load(Path(path).read_text())
    assert not list(chdir_tmp.rglob("*quantized_checkpoint*"))


def test_calibration_with_evaluation_quantizes(quantize):
    record, folder, log = quantize("--evaluate", "--qe", "--qe-calibration", "0.1")
    assert record["calibration"]["images"] == 53
    assert (folder / "acts_quantization_stats.yaml").exists()
    assert "of the 26 evaluation images are also calibration images" in log


@pytest.mark.parametrize(
    "pair", [(a, b) for a in SOURCES for b in SOURCES if a < b], ids=lambda pair: " and ".join(pair)
)
def test_only_one_source_of_ranges_may_be_given(pair, run_cli, tmp_path):
    done = run_cli("quantize", "--evaluate", "--qe", *SOURCES[pair[1]], *SOURCES[pair[0]])
    assert done.exit_code == 2
    named = [flag for flag in SOURCES if flag in pair]
    assert f"Error: {' and '.join(named)} exclude one another; give one of them." in done.stderr
    assert not any(tmp_path.iterdir())


def test_two_shares_of_calibration_images_are_refused(run_cli):
    done = run_cli("quantize", "--qe-calibration", "0.1", "--fraction", "0.2")
    assert done.exit_code == 2
    assert "--qe-calibration and --fraction exclude one another" in done.stderr


def test_two_devices_are_refused(run_cli):
    for pair in (("--cpu", "--gpus", "0"), ("--device", "cpu", "--gpus", "0"), ("--device", "cuda", "--cpu")):
        done = run_cli("evaluate", *pair)
        assert done.exit_code == 2
        assert " exclude one another; give one of them." in done.stderr


@pytest.mark.parametrize("flag", ["--resume-from", "--exp-load-weights-from"])
def test_distillers_flags_load_a_checkpoint(flag, run_cli, chdir_tmp):
    state = load_model("digits_resnet").model.state_dict()
    state["fc.bias"] += torch.eye(10)[3] * 1000  # everything is a three
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, "trained.pth.tar")
    done = run_cli(
        "evaluate",
        "-a",
        "digits_resnet",
        "--dataset",
        "digits",
        flag,
        "trained.pth.tar",
        *SMALL,
        "--confusion",
    )
    assert done.exit_code == 0, done.output
    folder = Path(done.stdout.splitlines()[-1])
    rows = list(csv.reader((folder / "confusion_float.csv").read_text().splitlines()))
    assert sum(int(row[4]) for row in rows[1:]) == 26
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["checkpoint"].endswith(
        "trained.pth.tar"
    )


@pytest.mark.parametrize(
    "pair",
    [
        ("--checkpoint", "--resume-from"),
        ("--checkpoint", "--exp-load-weights-from"),
        ("--resume-from", "--exp-load-weights-from"),
    ],
)
def test_one_checkpoint_is_loaded(pair, run_cli):
    done = run_cli("quantize", pair[1], "b.pth", pair[0], "a.pth")
    assert done.exit_code == 2
    assert f"Error: {pair[0]} and {pair[1]} exclude one another; give one of them." in done.stderr


def test_a_list_goes_on_to_the_next_option():
    assert parsed("--qencl", "fc", "conv1", "--qem", "asym_u") == {
        "no_clip_layers": ("fc", "conv1"),
        "mode": "asym_u",
    }
    assert parsed("--qenql", "a", "b", "--qencl", "c", "d", "e", "--qepc") == {
        "no_quant_layers": ("a", "b"),
        "no_clip_layers": ("c", "d", "e"),
        "per_channel_weights": True,
    }


def test_a_list_ends_at_data_that_is_there(chdir_tmp):
    """E10: a list swallowed the data set."""
    (chdir_tmp / "images").mkdir()
    assert parsed("--qencl", "fc", "conv1", "images", "--qem", "sym") == {
        "no_clip_layers": ("fc", "conv1"),
        "path": Path("images"),
        "mode": "sym",
    }
    assert parsed("--qencl", "fc", "--", "conv1")["path"] == Path("conv1")


def test_layers_of_a_list_are_not_clipped(quantize):
    _, folder, _ = quantize(
        "--qencl", "fc", "conv1", "--qem", "asym_u", "--qeca", "avg", "--calib-samples", "8"
    )
    params = yaml.safe_load((folder / "layer_quant_params.yaml").read_text())
    clips = {name: layer["clip_activations"] for name, layer in params.items() if "clip_activations" in layer}
    assert {name for name, clip in clips.items() if clip == "none"} == {"conv1", "fc"}
    assert settings(folder)["no_clip_layers"] == ["fc", "conv1"]


# Files


def test_a_quantizer_file_of_distiller_quantizes_the_digits(quantize, measured):
    path = measured.parent / "q.yaml"
    path.write_text(QUANTIZER)
    record, folder, log = quantize("--evaluate", "--qe", "--qe-config-file", path, "--qe-bits-wts", "7")
    assert record["quantized"]["top1"] >= 80
    assert record["calibration"] == {"stats_file": str(measured)}
    assert f"taking {measured} for ../no/such/folder/acts_quantization_stats.yaml" in log
    assert "--qe-bits-wts 7 wins over the file, which has 5" in log.splitlines()
    params = yaml.safe_load((folder / "layer_quant_params.yaml").read_text())
    assert (params["conv1"]["bits_weights"], params["fc"]["bits_weights"]) == (7, 8)
    again, _, _ = quantize("-c", folder / "config.yaml")
    assert again["quantized"]["loss"] == record["quantized"]["loss"]


def test_settings_of_the_working_directory_are_used_and_said(quantize, chdir_tmp):
    (chdir_tmp / "qtool.yaml").write_text("quantizers: {bits_weights: 3, no_quant_layers: [fc]}\n")
    _, folder, log = quantize("--calib-samples", "8", "--qenql", "conv1", "--qem", "asym_s")
    assert "settings from qtool.yaml" in log.splitlines()
    assert "--qe-no-quant-layers conv1 wins over the file, which has fc" in log.splitlines()
    assert "--qe-mode" not in log  # the file does not speak of it
    assert (settings(folder)["bits_weights"], settings(folder)["no_quant_layers"]) == (3, ["conv1"])
    (chdir_tmp / "other.yaml").write_text("run: {name: other}\n")
    _, folder, log = quantize("--calib-samples", "8", "-c", "other.yaml")
    assert "qtool.yaml" not in log
    assert settings(folder)["bits_weights"] == 8


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("data: {batch_size: 8}", ("-b", "16"), "--batch-size 16 wins over the file, which has 8"),
        (
            "quantizers: {mode: sym}",
            ("--qem", "asym_u"),
            "--qe-mode asym_u wins over the file, which has sym",
        ),
        (
            "quantizers: {per_channel_weights: false}",
            ("--qepc",),
            "--qe-per-channel wins over the file, which ha",
        ),
        ("data: {path: one}", ("two",), "DATA two wins over the file, which has one"),
    ],
)
def test_a_flag_that_wins_over_the_file_is_said(text, args, message, run_cli, chdir_tmp):
    """E7: flags beside a configuration file were ignored without a word."""
    (chdir_tmp / "c.yaml").write_text(text)
    log = run_cli("quantize", "-c", "c.yaml", *args, "--qe-dynamic", "--per-sample", "-a", "nothing").stderr
    assert [line for line in log.splitlines() if line.startswith(message)]


# Dynamic mode


@pytest.mark.parametrize("flags", [(), ("--per-sample", "-b", "7")])
def test_dynamic_mode_needs_no_calibration(flags, quantize, run_cli):
    record, folder, log = quantize("--qe-dynamic", *flags, "--qem", "asym_u", "--qepc")
    assert record["calibration"] == {"dynamic": True, "per_sample": bool(flags)}
    assert record["agreement"] >= 90
    assert "dynamic mode: the ranges of activations are those of each batch" in log
    assert not list(folder.glob("*stats*"))
    saved = folder / "quantized_checkpoint.pth.tar"
    done = run_cli("evaluate", "--checkpoint", saved, *SMALL, *flags[1:])
    again = json.loads(Path(done.stdout.splitlines()[-1], "results.json").read_text())
    assert again["quantized"]["loss"] == record["quantized"]["loss"]


def test_per_sample_results_do_not_depend_on_the_batch_size(quantize):
    losses = {size: quantize("--qe-dynamic", "--per-sample", "-b", size)[0] for size in (1, 26)}
    assert losses[1]["quantized"]["loss"] == pytest.approx(losses[26]["quantized"]["loss"], rel=1e-6)
    whole = quantize("--qe-dynamic", "-b", "26")[0]["quantized"]["loss"]
    assert whole != pytest.approx(losses[26]["quantized"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--per-sample",), "--per-sample: has an effect with --qe-dynamic only; add that, or leave it out"),
        (("--qe-dynamic", "--fraction", "0.1"), "--qe-dynamic: calibration images were given too; leave out"),
        (("--gpus", "0"), "--device: cuda:0 cannot be used here: "),
        (("--gpus", "0,1"), "--device: cuda:0,1 cannot be used here: "),
        (("--qe-config-file", "none.yaml"), "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(args, message, run_cli, tmp_path):
    if args[0] == "--gpus" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_cli("quantize", *args)
    *_, last = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (1, "")
    assert last.startswith(f"error: {message}")
    assert not any(tmp_path.iterdir())


# General options


def test_progress_is_logged_every_so_many_batches(quantize):
    _, folder, log = quantize("-b", "10", "-p", "2", "--calib-samples", "25", "--cpu", "--skip-float")
    expected = ["calibrating: batch 1 of 1"]  # of small images many go through the network at once
    expected += [f"evaluating quantized: batch {n} of 3" for n in (2, 3)]
    assert [line for line in log.splitlines() if "batch " in line] == expected
    (path,) = folder.glob("*.log")
    assert expected[-1] in path.read_text()


def test_deterministic_operations_are_asked_for_in_one_run_only(quantize, deterministic_as_before):
    quantize("--det", "--calib-samples", "8", "--skip-float")
    assert torch.are_deterministic_algorithms_enabled()
    quantize("--calib-samples", "8", "--skip-float")
    assert not torch.are_deterministic_algorithms_enabled()


def test_confusion_counts_every_image(quantize):
    record, folder, _ = quantize("--confusion", "--calib-samples", "8", "--qe-bits-wts", "2")
    for name in ("float", "quantized"):
        rows = list(csv.reader((folder / f"confusion_{name}.csv").read_text().splitlines()))
        counts = [[int(cell) for cell in row[-10:]] for row in rows[-10:]]
        assert sum(map(sum, counts)) == 26
        right = sum(counts[i][i] for i in range(10))
        assert 100 * right / 26 == pytest.approx(record[name]["top1"])


# Distiller's documented command lines, on real images

ROWS = {
    "sym 8": (),
    "sym 8 per channel": ("--qe-per-channel",),
    "clipped": ("--qe-per-channel", "--qe-clip-acts", "avg"),
    "fc not clipped": ("--qe-per-channel", "--qe-clip-acts", "avg", "--qe-no-clip-layers", "fc"),
    "asym 8": ("--qe-mode", "asym_u"),
    "asym 8 per channel": ("--qe-mode", "asym_u", "--qe-per-channel", "--qe-clip-acts", "avg",
                           "--qe-no-clip-layers", "fc"),
    "sym 6": ("--qe-bits-acts", "6", "--qe-bits-wts", "6"),
    "asym 6": ("--qem", "asym_u", "--qeba", "6", "--qebw", "6"),
    "asym 6 per channel": ("--qem", "asym_u", "--qeba", "6", "--qebw", "6", "--qepc", "--qeca", "avg",
                           "--qencl", "fc"),
    "dynamic": ("--qe-dynamic", "--qepc"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_documented_command_line_runs_on_resnet18(row, run_cli, shared_data):
    stats = ("--qe-stats-file", shared_data / "distiller" / "resnet18_quant_stats.yaml")
    done = run_cli(
        *("quantize", "-a", "resnet18", "--checkpoint", shared_data / "weights" / "resnet18.pth", "-p", "10"),
        *("-j", "0", "--effective-test-size", "0.008", "--classes", shared_data / "imagenet-classes.txt"),
        *("--evaluate", "--quantize-eval", *ROWS[row], *(() if row == "dynamic" else stats)),
        shared_data / "imagenet-nips2017",
    )
    assert done.exit_code == 0, done.output
    folder = Path(done.stdout.splitlines()[-1])
    record = json.loads((folder / "results.json").read_text())
    assert record["quantized"]["images"] == 8
    # Six symmetric bits with one scale per layer lose Distiller's ResNets too: 76.1 -> 36.1.
    assert record["agreement"] >= (50 if "6" not in row or "per channel" in row else 0)
    assert record["logit_sqnr_db"] > (10 if "8" in row else 2)
