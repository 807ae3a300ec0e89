"""What a user can get wrong: one line that says so, exit code 1, and nothing half-written."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qtool.models import load_model

QUICK = ("--effective-test-size", "0.05", "--calib-samples", "8", "--workers", "0")
# The same for runs that bring their own statistics.
FEW = (*QUICK[:2], "--workers", "0")


@pytest.fixture
def refused(run_cli, chdir_tmp):
    """Run a command that must fail, and give the one line that says why."""

    def run(*args: object) -> str:
        before = set(chdir_tmp.rglob("*"))
        result = run_cli(*args)
        *progress, message = result.stderr.splitlines()
        assert (result.exit_code, result.stdout) == (1, "")
        assert not [line for line in progress if line.startswith(("error", "Traceback", " "))]
        files = {path for path in set(chdir_tmp.rglob("*")) - before if path.is_file()}
        assert not files
        assert message.startswith("error: ")
        return message.removeprefix("error: ")

    return run


@pytest.fixture
def digit_folder(chdir_tmp) -> Path:
    """The folder `digits` of ten class folders with two 8x8 images each."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 2, 8, 8), dtype=np.uint8)
    for label in range(10):
        folder = Path("digits", f"class{label}")
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(pixels[label, number]).save(folder / f"{number}.png")
    return Path("digits")


@pytest.fixture
def truncated(digit_folder) -> Path:
    """One of its images, cut short."""
    path = digit_folder / "class3" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.fixture
def stats_tree(run_cli, chdir_tmp) -> dict:
    """The content of a stats file of the embedded network."""
    assert run_cli("calibrate", "--calib-samples", "4", "-j", "0", "-o", "calibrated").exit_code == 0
    (path,) = Path("calibrated").glob("*/acts_quantization_stats.yaml")
    return yaml.safe_load(path.read_text())


@pytest.fixture
def quantize_with(refused):
    """Quantize with statistics that must be refused."""

    def run(tree: dict, *options: str) -> str:
        Path("stats.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return refused("quantize", *FEW, "--qe-stats-file", "stats.yaml", *options)

    return run


class RunsCode:
    """What pickle stores as a call of a function."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


# Images


def test_data_that_is_not_there(refused):
    message = refused("quantize", "-a", "digits_resnet", "nowhere")
    assert message == "nowhere: no such file or folder; DATA names the evaluation images"


def test_data_that_is_a_file_of_another_kind(refused):
    Path("notes.txt").write_text("hello")
    message = refused("evaluate", "-a", "digits_resnet", "notes.txt")
    assert message.startswith("notes.txt: is a file; DATA is a folder of class folders")


def test_data_that_is_a_damaged_archive(refused):
    Path("images.npz").write_bytes(b"PK\x03\x04 and no more")
    assert refused("evaluate", "-a", "digits_resnet", "images.npz").startswith("images.npz: is not a whole")


def test_empty_folder(refused):
    Path("empty").mkdir()
    message = refused("quantize", "-a", "digits_resnet", "empty")
    assert message.startswith("empty: no class folders; looked for CLASS/NAME with .jpg")


def test_class_folder_without_images(refused):
    Path("data", "cat").mkdir(parents=True)
    assert refused("quantize", "-a", "digits_resnet", "data").startswith("data: 1 folders, but no image in")


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named(workers, truncated, refused):
    message = refused("evaluate", "-a", "digits_resnet", "digits", "-j", workers)
    assert message == (
        f"{truncated}: cannot be read: image file is truncated; replace the image or pass --skip-bad-images"
    )


def test_skipped_image_is_named_and_counted(truncated, run_cli):
    result = run_cli("evaluate", "-a", "digits_resnet", "digits", "-j", "0", "--skip-bad-images")
    record = yaml.safe_load(next(Path("logs").glob("*/results.json")).read_text())
    assert result.exit_code == 0
    assert f"skipped 1 unreadable images, such as {truncated}" in result.stderr
    assert (record["evaluation"]["images"], record["evaluation"]["skipped"]) == (19, 1)


def test_skipped_calibration_image_does_not_count(truncated, run_cli):
    options = ("-a", "digits_resnet", "digits", "-j", "0", "--skip-bad-images", "--fraction", "1")
    done = run_cli("quantize", *options)
    record = yaml.safe_load(next(Path("logs").glob("*/results.json")).read_text())
    assert done.exit_code == 0
    assert (record["calibration"]["images"], record["calibration"]["skipped"]) == (19, 1)
    calibrated = run_cli("calibrate", *options)
    assert "20 of 20 images of digits (seed 0), 1 of them unreadable\n" in calibrated.stdout


def test_only_bad_images_cannot_be_skipped(digit_folder, refused):
    for path in digit_folder.rglob("*.png"):
        path.write_bytes(b"")
    message = refused("evaluate", "-a", "digits_resnet", "digits", "-j", "0", "--skip-bad-images")
    assert message.startswith("digits: none of 20 images can be read; digits/class0/0.png: cannot be read")


def test_wrong_number_of_classes(digit_folder, refused):
    shutil.rmtree(digit_folder / "class9")
    assert refused("evaluate", "-a", "digits_resnet", "digits") == (
        "digits: 9 class folders, but the model has 10 outputs; "
        "say which class each folder is with --classes FILE, or pass --num-classes 9"
    )


def test_labels_beyond_the_outputs(refused):
    np.savez("wrong.npz", images=np.zeros((2, 8, 8), np.uint8), labels=[3, 12])
    message = refused("evaluate", "-a", "digits_resnet", "wrong.npz")
    assert "wrong.npz#1: its class is 12, but the model has 10 outputs" in message


def test_images_without_a_network(digit_folder, refused):
    message = refused("quantize", "digits")
    assert message == "--arch: no network named for these images; add -a, such as -a resnet18"


def test_network_without_images(run_cli, chdir_tmp):
    result = run_cli("evaluate", "-a", "resnet20_cifar")
    assert result.exit_code == 1
    assert "error: DATA: resnet20_cifar needs images; name a folder or file" in result.stderr


def test_more_calibration_images_than_there_are(refused):
    message = refused("calibrate", "--calib-samples", "999")
    assert message == ("--calib-samples: 999 images asked for, but digits calibration has 360; ask for fewer")


# Networks and checkpoints


def test_unknown_network_names_the_nearest(refused):
    assert refused("layers", "-a", "resnet_18").startswith(
        "--arch: no network is called 'resnet_18'; did you mean 'resnet18'"
    )


def test_checkpoint_of_another_network(refused):
    torch.save({"features.weight": torch.zeros(2)}, "other.pth")
    message = refused("evaluate", "-a", "digits_resnet", "--checkpoint", "other.pth")
    assert message.startswith("other.pth: does not fit digits_resnet: 42 missing (conv1.weight, ")
    assert message.endswith("1 unexpected (features.weight); name the network that it was saved from")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_that_needs_code_is_not_run(zipped, refused):
    torch.save({"x": RunsCode()}, "evil.pth", _use_new_zipfile_serialization=zipped)
    message = refused("evaluate", "-a", "digits_resnet", "--checkpoint", "evil.pth")
    assert message.startswith("evil.pth: needs the class posix.system, and so would run code of its own; ")
    assert not Path("was_run").exists()


@pytest.mark.parametrize("content", [b"hello" * 20, b"", b"PK\x03\x04"])
def test_checkpoint_that_is_none(content, refused):
    Path("junk.pth").write_bytes(content)
    message = refused("evaluate", "-a", "digits_resnet", "--checkpoint", "junk.pth")
    assert message.startswith("junk.pth: is ")
    assert "again" in message


def test_weights_whose_extent_is_beyond_float32(run_cli, refused):
    state = load_model("digits_resnet").model.state_dict()
    state["fc.weight"][0, :2] = torch.tensor([-3e38, 3e38])
    torch.save(state, "huge.pth")
    message = refused(
        "quantize", "-a", "digits_resnet", "--checkpoint", "huge.pth", "--dataset", "digits",
        "--qe-mode-wts", "asym_s", "--qe-dynamic", *FEW,
    )  # fmt: skip
    assert message == (
        "layer 'fc': its weight has no grid: x_min and x_max must be finite, and so their distance, "
        "found -3e+38 and 3e+38; check the checkpoint"
    )


def test_checkpoint_that_is_not_there(refused):
    message = refused("evaluate", "-a", "digits_resnet", "--checkpoint", "missing.pth")
    assert message == "missing.pth: no such file; correct --checkpoint"


def test_weights_without_a_network(refused):
    torch.save({"conv1.weight": torch.zeros(2)}, "weights.pth")
    message = refused("evaluate", "--checkpoint", "weights.pth")
    assert message == "--arch: weights.pth holds weights only; say with -a which network they are of"


def test_quantized_network_cannot_be_quantized_again(run_cli, refused):
    assert run_cli("quantize", *QUICK, "--skip-float", "-o", "first").exit_code == 0
    (path,) = Path("first").glob("*/quantized_checkpoint.pth.tar")
    message = refused("quantize", "--checkpoint", path)
    assert message.endswith("'qtool evaluate' evaluates it, 'qtool quantize' needs a float network")


# Statistics


def test_stats_without_a_layer(stats_tree, quantize_with):
    del stats_tree["layer1.add"]
    message = quantize_with(stats_tree)
    assert message.startswith("stats.yaml: no entry for 'layer1.add'; did you mean 'layer2.add'")
    assert message.endswith("measured with 'qtool calibrate'")


def test_stats_without_an_output(stats_tree, quantize_with):
    del stats_tree["layer1.add"]["output"]
    message = quantize_with(stats_tree)
    assert message.startswith("stats.yaml: layer 'layer1.add' has no record of its output; run 'qtool cal")


def test_stats_without_a_field(stats_tree, quantize_with):
    del stats_tree["fc"]["output"]["max"]
    assert quantize_with(stats_tree).startswith("stats.yaml: fc.output: field 'max' is missing")


@pytest.mark.parametrize(
    ("field", "options"),
    [("avg_max", ("--qeca", "avg")), ("std", ("--qeca", "n_std", "--qe-clip-n-stds", "2"))],
)
def test_stats_without_the_field_that_clipping_needs(field, options, stats_tree, quantize_with):
    del stats_tree["layer1.add"]["output"][field]
    message = quantize_with(stats_tree, *options)
    assert "layer1.add" in message
    assert field in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "many"])
def test_stats_that_are_no_numbers(value, stats_tree, quantize_with):
    stats_tree["fc"]["output"]["max"] = value
    message = quantize_with(stats_tree)
    assert message.startswith("stats.yaml: fc.output.max: found ")
    assert "number is wanted" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no layers found"),
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"fc: 3", "fc: found int 3; a mapping with 'inputs' and 'output' is wanted"),
    ],
)
def test_stats_file_that_is_none(content, reason, refused):
    Path("stats.yaml").write_bytes(content)
    message = refused("quantize", *FEW, "--qe-stats-file", "stats.yaml")
    assert message.startswith(f"stats.yaml: {reason}")


def test_stats_file_that_is_not_there(refused):
    message = refused("quantize", *FEW, "--qe-stats-file", "none.yaml")
    assert message.startswith("none.yaml: cannot be read: No such file or directory")


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qeca", "n_std"], "--qe-clip-acts n_std: needs --qe-clip-n-stds, such as 3"),
        (
            ["--qe-clip-n-stds", "3"],
            "--qe-clip-n-stds: has no effect with clip mode none; add '--qe-clip-acts",
        ),
        (
            ["--qencl", "layer1.cnv1"],
            "--qe-no-clip-layers: pattern 'layer1.cnv1': matches no layer; did you mean 'layer1.conv1'",
        ),
        (["--qenql", "("], "--qe-no-quant-layers: pattern '(': not a regular expression"),
        (["--fraction", "0.5"], "--fraction and --calib-samples: both say how many images calibrate"),
        (["--device", "tpu9"], "--device: tpu9 cannot be used here: "),
        (["--device", "meta"], "--device: meta cannot be used here: "),
        (["--num-classes", "5"], "--num-classes: the packaged weights of digits_resnet have 10 classes"),
        (["--input-shape", "3,8,8"], "digits_resnet: does not run on an input of shape (1, 3, 8, 8)"),
        (["--calib-split", "trian"], "digits: no 'trian' part; it has train, calibration, test"),
        (["--calib-data", "gone"], "gone: no such file or folder"),
        (["--name", "a/b"], "--name: 'a/b' cannot be part of a folder's name; leave out the '/'"),
        (["-c", "gone.yaml"], "gone.yaml: cannot be read: No such file or directory"),
    ],
)
def test_settings_that_cannot_be_honoured(options, message, refused):
    assert refused("quantize", *QUICK, *options).startswith(message)


def test_every_problem_of_a_config_file_is_a_line(run_cli):
    Path("a.yaml").write_text("quantizers:\n  bits_wieghts: 8\n  bits_activations: 40\n")
    result = run_cli("quantize", "-c", "a.yaml")
    first, second = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first.startswith("error: a.yaml:2: quantizers: unknown key 'bits_wieghts'; did you mean 'bits_w")
    assert second.startswith("error: a.yaml:3: quantizers.bits_activations: 40 is not 0 (float) or in the")


def test_every_pattern_without_a_match_is_a_line(run_cli):
    result = run_cli("layers", "--qencl", "zzz", "--qenql", "yyy")
    assert result.exit_code == 1
    assert [line.split(":")[1:3] for line in result.stderr.splitlines()[-2:]] == [
        [" --qe-no-clip-layers", " pattern 'zzz'"],
        [" --qe-no-quant-layers", " pattern 'yyy'"],
    ]
