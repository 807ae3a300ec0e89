"""Whole runs on the embedded network and digits: what they print, write, and repeat."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from qtool.cli import main

QUICK = ("--effective-test-size", "0.1", "--calib-samples", "16", "--workers", "0")
STATS = "acts_quantization_stats.yaml"
PARAMS = "layer_quant_params.yaml"
CHECKPOINT = "quantized_checkpoint.pth.tar"
STAMP = r"\d{4}\.\d\d\.\d\d-\d{6}(-\d+)?"


def run_folder(out_dir: Path, *args: object) -> Path:
    """The folder of a run that ends well."""
    result = CliRunner().invoke(main, [*map(str, args), "-o", str(out_dir)])
    assert result.exit_code == 0, result.output
    last_line = Path(result.stdout.splitlines()[-1])
    return last_line if last_line.is_dir() else last_line.parent


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def without_speed(record: dict) -> dict:
    return {
        key: {k: v for k, v in value.items() if k != "images_per_second"}
        if isinstance(value, dict)
        else value
        for key, value in record.items()
    }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """The folder of a run that saved predictions, in preds.npz beside it."""
    out_dir = tmp_path_factory.mktemp("quantized")
    options = ("--qem", "asym_u", "--qepc", "--save-predictions", out_dir / "preds.npz")
    return run_folder(out_dir, "quantize", *QUICK, *options)


def test_calibrate_needs_a_fraction_only(run_cli):
    result = run_cli("calibrate", "--fraction", "0.05")
    headline, path = result.stdout.splitlines()
    assert result.exit_code == 0
    assert result.stderr.startswith("no model or data named: using the embedded digits_resnet and UCI")
    assert "these are evaluation images: for an accuracy on unseen images" in result.stderr
    assert headline == "27 layers of digits_resnet on 26 of 537 images of digits test (seed 0)"
    stats = yaml.safe_load(Path(path).read_text())
    assert len(stats) == 1 + 27  # the header
    assert stats["conv1"]["inputs"][0]["total_numel"] == 26 * 64


def test_quantize_needs_no_data_and_stays_accurate(run_cli):
    result = run_cli("quantize", "--qe-mode", "asym_u", "--qe-per-channel")
    record = results(Path(result.stdout.splitlines()[-1]))
    assert result.exit_code == 0
    assert result.stderr.startswith("no model or data named: using the embedded digits_resnet and UCI")
    assert record["float"]["images"] == record["quantized"]["images"] == 537
    assert record["float"]["top1"] > 98
    assert abs(record["top1_difference"]) < 1
    assert record["calibration"] == {
        "images": 256, "skipped": 0, "dataset": "digits calibration", "overlap": 0,
    }  # fmt: skip


def test_run_folder_holds_every_file(quantized):
    assert re.fullmatch(STAMP, quantized.name)
    assert {path.name for path in quantized.iterdir()} == {
        f"{quantized.name}.log", "config.yaml", STATS, "acts_histograms.npz",
        "quant_stats_after_prepare_model.yaml", PARAMS, CHECKPOINT, "results.json",
    }  # fmt: skip


def test_name_starts_the_folder_and_the_checkpoint(tmp_path):
    folder = run_folder(tmp_path, "quantize", *QUICK, "--skip-float", "-n", "trial")
    assert re.fullmatch(f"trial___{STAMP}", folder.name)
    assert (folder / f"trial_{CHECKPOINT}").is_file()


def test_results_have_float_and_quantized_side_by_side(quantized):
    record = results(quantized)
    for network in ("float", "quantized"):
        found = record[network]
        assert set(found) == {"top1", "top5", "loss", "images", "images_per_second"}
        assert 0 <= found["top1"] <= found["top5"] <= 100
        assert found["images"] == 53
    assert 0 < record["float"]["loss"] != record["quantized"]["loss"]
    assert record["top1_difference"] == record["quantized"]["top1"] - record["float"]["top1"]
    assert 0 <= record["agreement"] <= 100
    assert record["evaluation"] == {
        "dataset": "digits test", "split": "evaluation", "images": 53, "skipped": 0,
    }  # fmt: skip


def test_printed_numbers_are_those_of_the_results_file(run_cli):
    result = run_cli("quantize", *QUICK)
    lines = result.stdout.splitlines()
    record = results(Path(lines[-1]))
    for line in lines[2:4]:
        name, top1, top5, loss, images, _ = line.split()
        found = record[name]
        assert [float(top1), float(top5), float(loss), int(images)] == [
            round(found["top1"], 3), round(found["top5"], 3), round(found["loss"], 4), found["images"],
        ]  # fmt: skip


def test_predictions_give_the_accuracies_of_the_results(quantized):
    saved = np.load(quantized.parent / "preds.npz")
    record = results(quantized)
    assert sorted(saved) == ["float_prediction", "label", "path", "quantized_prediction"]
    assert len(set(saved["path"].tolist())) == 53
    for network in ("float", "quantized"):
        right = saved[f"{network}_prediction"] == saved["label"]
        assert 100 * right.mean() == pytest.approx(record[network]["top1"])
    same = saved["float_prediction"] == saved["quantized_prediction"]
    assert 100 * same.mean() == pytest.approx(record["agreement"])


def test_written_config_repeats_the_run(quantized, tmp_path):
    again = run_folder(tmp_path, "quantize", "-c", quantized / "config.yaml")
    assert without_speed(results(again)) == without_speed(results(quantized))
    assert (again / CHECKPOINT).read_bytes() == (quantized / CHECKPOINT).read_bytes()


def test_saved_checkpoint_evaluates_as_it_did(quantized, tmp_path):
    checkpoint = quantized / CHECKPOINT
    folder = run_folder(tmp_path, "evaluate", "--checkpoint", checkpoint, *QUICK[:2], "-j", "0")
    record = without_speed(results(folder))
    assert record["quantized"] == without_speed(results(quantized))["quantized"]
    assert "float" not in record


def test_evaluate_alone_gives_the_float_numbers(quantized, tmp_path):
    record = without_speed(results(run_folder(tmp_path, "evaluate", *QUICK[:2], "-j", "0")))
    assert record["float"] == without_speed(results(quantized))["float"]


def test_skip_float_leaves_float_and_comparison_out(tmp_path):
    record = results(run_folder(tmp_path, "quantize", *QUICK, "--skip-float"))
    assert "quantized" in record
    assert not {"float", "agreement", "top1_difference"} & record.keys()


def test_stats_file_of_calibrate_gives_what_quantize_measures(quantized, tmp_path):
    calibrated = run_folder(tmp_path, "calibrate", "--calib-samples", "16", "-j", "0")
    given = ("--qe-stats-file", calibrated / STATS)
    folder = run_folder(tmp_path, "quantize", *QUICK[:2], "-j", "0", "--qem", "asym_u", "--qepc", *given)
    assert (calibrated / STATS).read_bytes() == (quantized / STATS).read_bytes()
    assert (folder / PARAMS).read_bytes() == (quantized / PARAMS).read_bytes()
    assert not (folder / STATS).exists()
    assert results(folder)["calibration"] == {"stats_file": str(calibrated / STATS)}


def test_another_seed_chooses_other_images(quantized, tmp_path):
    other = run_folder(tmp_path, "calibrate", "--calib-samples", "16", "-j", "0", "--seed", "1")
    assert (other / STATS).read_bytes() != (quantized / STATS).read_bytes()


def test_workers_change_no_byte(quantized, tmp_path):
    options = ("--calib-samples", "16", "-b", "64", "-j", "2")
    assert (run_folder(tmp_path, "calibrate", *options) / STATS).read_bytes() == (
        quantized / STATS
    ).read_bytes()


def test_neither_batch_size_nor_workers_change_the_statistics(quantized, tmp_path):
    flags = ("--calib-samples", "16", "-b", "5", "-j", "2")
    folder = run_folder(tmp_path, "calibrate", *flags)
    for name in (STATS, "acts_histograms.npz"):
        assert (folder / name).read_bytes() == (quantized / name).read_bytes()


def test_averages_over_batches_depend_on_their_size(quantized, tmp_path):
    folder = run_folder(
        tmp_path, "calibrate", "--calib-samples", "16", "-b", "8", "--batchwise-statistics", "off", "-j", "0"
    )
    by_batch, by_image = (yaml.safe_load((f / STATS).read_text()) for f in (folder, quantized))
    assert by_batch["relu"]["output"]["max"] == by_image["relu"]["output"]["max"]
    assert by_batch["relu"]["output"]["avg_max"] > by_image["relu"]["output"]["avg_max"]


def test_calibration_on_evaluation_images_is_said(run_cli):
    result = run_cli("quantize", "--fraction", "0.05", "-j", "0", "--skip-float")
    assert "26 of the 537 evaluation images are also calibration images" in result.stderr
    assert results(Path(result.stdout.splitlines()[-1]))["calibration"]["overlap"] == 26


def test_clipping_by_the_error_is_better_than_none_at_three_bits_and_is_recorded(tmp_path):
    bits = ("--qem", "sym", "--qeba", "3", "--qebw", "3", "--skip-float")
    weights = ("--qe-clip-wts", "percentile", "--qe-clip-percentile-wts", "99.9")
    plain, clipped = (
        run_folder(tmp_path, "quantize", *QUICK, *bits, *weights, "--qe-clip-acts", mode)
        for mode in ("none", "mse")
    )
    assert results(clipped)["quantized"]["loss"] < results(plain)["quantized"]["loss"]
    conv1 = yaml.safe_load((clipped / PARAMS).read_text())["conv1"]
    assert (conv1["clip_activations"], conv1["clip_weights"]) == ("mse", "percentile")
    assert conv1["clip_percentile_weights"] == 99.9


def test_another_estimator_takes_the_histograms_of_an_earlier_calibration(quantized, tmp_path):
    options = ("--qem", "asym_u", "--qepc", "--qe-clip-acts", "kl", "--skip-float")
    evaluation = ("--effective-test-size", "0.1", "--workers", "0")
    again = run_folder(tmp_path, "quantize", *evaluation, *options, "--qe-stats-file", quantized / STATS)
    measured = run_folder(tmp_path, "quantize", *QUICK, *options)
    assert (again / PARAMS).read_bytes() == (measured / PARAMS).read_bytes()
    assert (again / PARAMS).read_bytes() != (quantized / PARAMS).read_bytes()


def test_four_bits_lose_more_than_eight(quantized, tmp_path):
    folder = run_folder(
        tmp_path, "quantize", *QUICK, "--qem", "asym_u", "--qepc", "--qebw", "4", "--qeba", "4"
    )
    params = yaml.safe_load((folder / PARAMS).read_text())
    assert params["conv1"]["weight"]["num_bits"] == params["conv1"]["output"]["num_bits"] == 4
    # Four bits of both weights and activations are worth about 24 dB.
    assert results(folder)["logit_sqnr_db"] < results(quantized)["logit_sqnr_db"] - 12


def test_checkpoint_loads_without_running_code(quantized):
    content = torch.load(quantized / CHECKPOINT, weights_only=True)
    assert content["format"] == "qtool-quantized"
    assert content["model"]["arch"] == "digits_resnet"


def test_log_holds_the_messages_and_how_the_run_ended(run_cli, chdir_tmp):
    np.savez("good.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.arange(4))
    for label in range(10):
        Path("images", str(label)).mkdir(parents=True)
        Path("images", str(label), "0.png").write_bytes(b"")
    done = run_cli(
        "quantize", "-a", "digits_resnet", "images", "--calib-data", "good.npz", "-j", "0", "-n", "failed"
    )
    (log,) = Path("logs").glob("failed*/*.log")
    assert done.exit_code == 1
    assert f"ended early; what was written until then is in {log.parent}\n" in done.stderr
    assert {path.name for path in log.parent.iterdir()} >= {STATS, "config.yaml"}
    assert "INFO network: digits_resnet" in log.read_text()
    assert "ended by DataError: images/0/0.png: cannot be read" in log.read_text()


def test_e11_layer_parameters_hold_every_bit_width_and_scale_once(quantized):
    """Distiller's file had null for the bits of weights, no scales per channel, and all statistics again."""
    text = (quantized / PARAMS).read_text()
    conv1 = yaml.safe_load(text)["conv1"]
    assert (conv1["bits_weights"], conv1["bits_activations"], conv1["bits_accum"]) == (8, 8, 32)
    assert len(conv1["weight"]["scale"]) == len(conv1["weight"]["zero_point"]) == 16
    assert conv1["output"]["scale"] > 0
    assert "&id" not in text and "total_numel" not in text
