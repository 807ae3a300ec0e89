"""qtool compare, from the command line to the files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

QUICK = ("--calib-samples", "48", "--effective-test-size", "0.2", "-j", "0")
FOUR_BITS = ("--qe-mode", "asym_u", "--qe-bits-acts", "3", "--qe-bits-wts", "3")


@pytest.fixture
def run(run_cli):
    """Run the command, which must end well: its text, what it wrote as YAML, and its folder."""

    def run(*args: object):
        result = run_cli("compare", *args)
        assert result.exit_code == 0, result.output
        folder = Path(result.stdout.splitlines()[-1])
        return result.stdout, yaml.safe_load((folder / "compare.yaml").read_text()), folder

    return run


@pytest.fixture
def quantized(run_cli, chdir_tmp):
    """A run at few bits: its checkpoint, its results, and the predictions of both networks."""

    def quantize(*args: object):
        result = run_cli("quantize", *QUICK, *FOUR_BITS, *args, "-n", "run", "--save-predictions", "p.npz")
        assert result.exit_code == 0, result.output
        (folder,) = chdir_tmp.glob("logs/run___*")
        predictions = np.load(chdir_tmp / "p.npz")
        return (
            folder / "run_quantized_checkpoint.pth.tar",
            json.loads((folder / "results.json").read_text()),
            predictions,
        )

    return quantize


def test_it_agrees_with_a_quantized_run(run, quantized):
    _, results, predictions = quantized()
    text, found, _ = run(*QUICK, *FOUR_BITS)
    assert found["logit_sqnr_db"] == pytest.approx(results["logit_sqnr_db"], abs=1e-3)
    assert found["agreement"] == pytest.approx(results["agreement"])
    flipped = predictions["float_prediction"] != predictions["quantized_prediction"]
    assert 0 < found["flipped"] == flipped.sum() == len(found["flips"])
    expected = sorted(
        zip(predictions["path"][flipped], predictions["quantized_prediction"][flipped], strict=True)
    )
    assert sorted((f["path"], f["quantized_prediction"]) for f in found["flips"]) == expected
    assert all(f["float_margin"] > 0 and f["quantized_margin"] >= 0 for f in found["flips"])
    assert f"{found['flipped']} of 107 predictions flip" in text


def test_the_files_and_the_table_hold_every_layer(run):
    text, found, folder = run(*QUICK, "--qe-mode", "asym_u")
    names = [row["layer"] for row in found["layers"]]
    assert names[0] == "conv1" and names[-1] == "fc" and len(names) == 12
    with (folder / "compare_layers.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["layer"] for row in written] == names
    assert all(f"\n{name} " in text for name in names)
    assert all(0 < row["used_range"] <= 1 and row["local_sqnr_db"] > 20 for row in found["layers"])
    assert found["layers"][-1]["sqnr_db"] == pytest.approx(found["logit_sqnr_db"], abs=1e-6)


def test_a_saved_checkpoint_is_compared_with_the_float_network(run, quantized):
    checkpoint, results, _ = quantized("--corrections", "gptq,bias_correction")
    _, found, _ = run(*QUICK[2:], "--quantized", checkpoint)
    assert found["logit_sqnr_db"] == pytest.approx(results["logit_sqnr_db"], abs=1e-3)


def test_an_equalized_checkpoint_is_noticed(run_cli, quantized):
    # At few bits a step is too long to tell.
    checkpoint, _, _ = quantized("--corrections", "equalization", "--qe-bits-wts", "8")
    result = run_cli("compare", *QUICK[2:], "--quantized", checkpoint)
    assert result.exit_code == 0 and "were equalized" in result.stderr


def test_corrections_by_flag_count(run):
    _, plain, _ = run(*QUICK, *FOUR_BITS)
    _, corrected, _ = run(*QUICK, *FOUR_BITS, "--corrections", "gptq")
    assert corrected["logit_sqnr_db"] > plain["logit_sqnr_db"] + 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--qe-dynamic",), "compare: compares on grids that are fixed"),
        (("--corrections", "equalization"), "equalization moves factors between layers"),
        (("--quantized", "nothing.pth"), "nothing.pth"),
        (("--confusion",), "--confusion: compare writes the images that flip only"),
    ],
)
def test_what_cannot_be_honoured_is_refused(run_cli, chdir_tmp, args, message):
    result = run_cli("compare", *QUICK[2:], *args)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output


def test_settings_of_a_quantizer_beside_a_quantized_file_are_refused(run_cli, quantized):
    checkpoint, _, _ = quantized()
    result = run_cli("compare", *QUICK[2:], "--quantized", checkpoint, "--qe-bits-acts", "4")
    assert result.exit_code == 1 and "is quantized already" in result.stderr


def test_a_float_file_is_no_quantized_one(run_cli, chdir_tmp):
    import torch

    from qtool.models.digits import DigitsResNet

    torch.save(DigitsResNet().state_dict(), "float.pth")
    result = run_cli(
        "compare", *QUICK[2:], "-a", "digits_resnet", "--quantized", "float.pth", "--dataset", "digits"
    )
    assert (
        result.exit_code == 1 and "is float; give the quantized_checkpoint.pth.tar of a run" in result.stderr
    )


@pytest.mark.slow
def test_of_resnet18_on_real_images(run, shared_data):
    _, found, _ = run(
        *("-a", "resnet18", "--checkpoint", shared_data / "weights" / "resnet18.pth", "-j", "0"),
        *("--classes", shared_data / "imagenet-classes.txt", "--calib-samples", "16"),
        *("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel"),
        *("--effective-test-size", "0.01", shared_data / "imagenet-nips2017"),
    )
    assert found["images"] == 10 and found["logit_sqnr_db"] > 20
    assert len(found["layers"]) == 31 and all(row["local_sqnr_db"] > 25 for row in found["layers"])
