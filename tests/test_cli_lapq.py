"""LAPQ and search-clipping as commands: what they find, write, refuse, and resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qtool.cli import main

QUICK = ("--calib-samples", "32", "--effective-test-size", "0.2", "--workers", "0")
FOUR_BITS = ("--qe-bits-acts", "4", "--qe-bits-wts", "4")
LAPQ = ("quantize", "--qe-lapq", "--lapq-maxfev", "100", *FOUR_BITS, *QUICK)
GREEDY = ("search-clipping", *FOUR_BITS, *QUICK)
JOURNAL = "search_journal.jsonl"
RANGES = "quant_params_dict.yaml"
PARAMS = "layer_quant_params.yaml"
MODES_FILE = "greedy_search.yaml"


def run(out_dir: Path, *args: object) -> tuple[Path, dict]:
    """The folder and the results of a run that ends well."""
    before = set(out_dir.glob("*/"))
    result = CliRunner().invoke(main, [*map(str, args), "-o", str(out_dir)])
    assert result.exit_code == 0, result.output
    (folder,) = set(out_dir.glob("*/")) - before
    return folder, json.loads((folder / "results.json").read_text())


def killed(out_dir: Path, *args: object, entries: int) -> Path:
    """The folder of a run in a process of its own, killed when its journal has some entries."""
    command = [sys.executable, "-m", "qtool", *map(str, args), "-o", str(out_dir)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        while process.poll() is None:
            journals = list(out_dir.glob(f"*/{JOURNAL}"))
            if journals and journals[0].read_bytes().count(b"\n") > entries:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    finally:
        process.kill()
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    (journal,) = out_dir.glob(f"*/{JOURNAL}")
    return journal.parent


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, dict]:
    """A run of LAPQ that was left alone."""
    return run(tmp_path_factory.mktemp("lapq"), *LAPQ)


@pytest.fixture(scope="module")
def decided(tmp_path_factory) -> tuple[Path, dict]:
    """A greedy search that was left alone."""
    return run(tmp_path_factory.mktemp("greedy"), *GREEDY)


def test_lapq_ends_below_its_initialisation(searched):
    folder, record = searched
    found = record["lapq"]
    assert found["final"]["loss"] < found["initial"]["loss"]
    assert found["initial"]["loss"] == min(found["losses_of_p"].values())
    assert found["images"] == {
        "images": 32, "dataset": "digits calibration", "split": "calibration", "overlap": 0
    }  # fmt: skip
    assert 10 < found["evaluations"] <= 112
    assert found["resumed"] == 0
    log = (folder / f"{folder.name}.log").read_text()
    assert "the search evaluates on 32 of the calibration images of digits calibration" in log
    assert f"LAPQ: loss {found['initial']['loss']:.6g} after initialisation" in log


def test_the_start_is_evaluated_beside_the_end(searched, tmp_path):
    _, record = searched
    result = CliRunner().invoke(main, [*LAPQ, "--lapq-maxfev", "1", "-o", str(tmp_path)])
    start = record["lapq"]["initial"]["evaluation"]
    assert start["images"] == record["quantized"]["images"]
    assert start["loss"] != record["quantized"]["loss"]
    assert f"LAPQ start {start['top1']:>9.3f}{start['top5']:>9.3f}{start['loss']:>9.4f}" in result.stdout


def test_the_time_that_is_left_is_shown(tmp_path):
    folder, _ = run(tmp_path, *LAPQ, "-p", "10", "--lapq-init-mode", "L2")
    log = (folder / f"{folder.name}.log").read_text()
    assert re.search(r"iteration 1: loss \S+, best \S+, 50 evaluations, about 00:\d\d left", log)


def test_with_statistics_the_calibration_images_are_those_of_the_search(searched, tmp_path):
    folder, _ = searched
    stats = folder / "acts_quantization_stats.yaml"
    quick = ("--lapq-maxfev", "3", "--lapq-init-mode", "none", "--calib-samples", "20")
    _, record = run(tmp_path, *LAPQ, *quick, "--qe-stats-file", stats)
    assert record["lapq"]["images"]["images"] == 20
    assert record["calibration"] == {"stats_file": str(stats)}


def test_the_ranges_found_give_the_same_network_again(searched, tmp_path):
    folder, record = searched
    again, repeated = run(tmp_path, "quantize", "-c", folder / RANGES, *QUICK)
    assert repeated["quantized"]["loss"] == record["quantized"]["loss"]
    assert (again / PARAMS).read_bytes() == (folder / PARAMS).read_bytes()


def test_a_killed_lapq_resumes_to_the_same_end(searched, tmp_path):
    whole, record = searched
    part = killed(tmp_path / "killed", *LAPQ, entries=250)
    assert not (part / "results.json").exists()
    entries = (part / JOURNAL).read_bytes().count(b"\n") - 1
    resumed, again = run(
        tmp_path / "resumed", "quantize", "-c", part / "config.yaml", "--resume-search-from", part
    )
    assert (resumed / RANGES).read_bytes() == (whole / RANGES).read_bytes()
    assert (resumed / PARAMS).read_bytes() == (whole / PARAMS).read_bytes()
    assert (resumed / JOURNAL).read_bytes() == (whole / JOURNAL).read_bytes()
    assert again["lapq"]["resumed"] in (entries - 1, entries)  # the last line may be half a one
    changing = {"resumed": 0, "seconds": 0}
    assert again["lapq"] | changing == record["lapq"] | changing


def test_a_killed_greedy_search_resumes_to_the_same_end(decided, tmp_path):
    whole, record = decided
    part = killed(tmp_path / "killed", *GREEDY, entries=15)
    assert set(yaml.safe_load((part / MODES_FILE).read_text())["quantizers"]["overrides"]) >= {"conv1"}
    resumed, again = run(tmp_path / "resumed", *GREEDY, "--resume-search-from", part)
    assert (resumed / MODES_FILE).read_bytes() == (whole / MODES_FILE).read_bytes()
    assert again["search_clipping"]["layers"] == record["search_clipping"]["layers"]
    assert again["search_clipping"]["resumed"] >= 14


def test_the_clip_modes_found_are_those_of_a_run(decided, tmp_path):
    folder, record = decided
    modes = {name: c["mode"] for name, c in record["search_clipping"]["layers"].items()}
    overrides = yaml.safe_load((folder / MODES_FILE).read_text())["quantizers"]["overrides"]
    assert {name: o["clip_activations"] for name, o in overrides.items()} == modes
    run(tmp_path, "quantize", "-c", folder / MODES_FILE, *QUICK)


@pytest.mark.parametrize(
    "options",
    [
        ("--qe-per-channel",),
        ("--qem", "asym_u", "--lapq-search-clipping", "--lapq-init-mode", "L2"),
        ("--qem", "asym_s", "--lapq-init-mode", "LAPLACE", "--lapq-method", "nelder-mead"),
        ("--lapq-bh", "--lapq-basinhopping-niter", "1", "--lapq-init-mode", "none"),
        ("--lapq-eval-size", "0.5", "--qe-scale-approx-bits", "8"),
    ],
)
def test_every_way_to_search_ends_not_above_its_start(tmp_path, options):
    folder, record = run(tmp_path, *LAPQ, "--lapq-maxfev", "12", *options)
    assert record["lapq"]["final"]["loss"] <= record["lapq"]["initial"]["loss"]
    again, _ = run(tmp_path, "quantize", "-c", folder / RANGES, *QUICK)
    assert (again / PARAMS).read_bytes() == (folder / PARAMS).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ("--qe-clip-acts", "gauss"),
        ("--qe-clip-acts", "percentile", "--qe-clip-percentile", "99"),
        ("--qe-clip-wts", "percentile", "--qe-clip-percentile-wts", "99"),
    ],
)
def test_clip_modes_are_set_aside_aloud(run_cli, options):
    result = run_cli(*LAPQ, "--lapq-maxfev", "1", *options)
    assert result.exit_code == 0
    assert "clip modes are set aside, such as that of conv1: --qe-lapq chooses all ranges" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantize", "--lapq-maxiter", "3"], "--lapq-maxiter: has an effect with --qe-lapq only"),
        (["quantize", "--lapq-eval-size", "0.5"], "--lapq-eval-size: has an effect with --qe-lapq only"),
        (["quantize", "--qe-lapq", "--qe-dynamic"], "--qe-lapq: searches for static ranges"),
        (["quantize", "--qe-lapq", "--qencl", "fc"], "--qe-no-clip-layers: --qe-lapq chooses all ranges"),
        (
            ["quantize", "--qe-lapq", "--lapq-basinhopping-niter", "3"],
            "--lapq-basinhopping-niter: has an effect with --lapq-basinhopping only",
        ),
        (["search-clipping", "--qe-dynamic"], "search-clipping: searches for static ranges"),
        ([*LAPQ, "--qeba", "0", "--qebw", "0"], "nothing to search: no layer is quantized"),
        ([*LAPQ, "--resume-search-from", "none"], "none/search_journal.jsonl: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_honoured_is_refused(run_cli, args, message):
    result = run_cli(*args)
    assert result.exit_code == 1
    assert f"error: {message}" in result.stderr


@pytest.mark.parametrize("options", [["--lapq-init-mode", "L4"], ["--lapq-method", "BFGS"]])
def test_unknown_choices_are_wrong_usage(run_cli, options):
    assert run_cli("quantize", "--qe-lapq", *options).exit_code == 2


def test_a_search_with_other_settings_is_not_resumed(searched, run_cli):
    result = run_cli(*LAPQ, "--qe-bits-wts", "3", "--resume-search-from", searched[0])
    assert result.exit_code == 1
    assert (
        "is of a search with other quantizers; resume it with the settings of its config.yaml"
        in result.stderr
    )


def test_settings_of_a_search_in_a_file_without_one_are_refused(run_cli, chdir_tmp):
    Path("a.yaml").write_text("search: {eval_size: 0.5}\n")
    assert "--lapq-eval-size: has an effect with --qe-lapq only" in run_cli("quantize", "-c", "a.yaml").stderr


def test_a_gate_does_not_search(run_cli, chdir_tmp):
    Path("g.yaml").write_text("runs: [{name: a, lapq: {enabled: true}, expect: {top1_min: 90}}]\n")
    result = run_cli("check", "g.yaml")
    assert result.exit_code == 1
    assert "runs.0.lapq: a gate does not search" in result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{output_range: [2, 1]}", "output_range: 2 is above 1; give the smaller one first"),
        ("{output_range: [1]}", "is not two numbers"),
        ("{output_range: [0, .inf]}", "is not two numbers"),
        (
            "{output_range: [0, 1], bits_activations: 0}",
            "output_range: has no effect with bits_activations 0",
        ),
        ("{weight_range_factors: [0, 1]}", "weight_range_factors: 0 is not positive"),
    ],
)
def test_wrong_ranges_in_a_file_are_refused(run_cli, chdir_tmp, settings, message):
    Path("a.yaml").write_text(f"quantizers: {{overrides: {{conv1: {settings}}}}}\n")
    result = run_cli("quantize", "-c", "a.yaml", *QUICK)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", [LAPQ, GREEDY])
def test_e12_a_search_writes_into_the_folder_of_its_run_only(command, run_cli, chdir_tmp):
    """Distiller's searches wrote to the working directory."""
    options = ("--search-eval-size", "0.2", *(("--lapq-maxiter", "1") if command is LAPQ else ()))
    assert run_cli(*command, *options).exit_code == 0
    assert [path.name for path in chdir_tmp.iterdir()] == ["logs"]
    assert len(list((chdir_tmp / "logs").iterdir())) == 1


def test_e13_the_number_of_repetitions_is_a_number(run_cli):
    """Distiller's came as text."""
    context = main.commands["quantize"].make_context("quantize", ["--lapq-basinhopping-niter", "3"])
    assert context.params["basinhopping_niter"] == 3
    result = run_cli("quantize", "--qe-lapq", "--lapq-basinhopping", "--lapq-basinhopping-niter", "many")
    assert result.exit_code == 2
    assert "'many' is not a valid integer range" in result.stderr
