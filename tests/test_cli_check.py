"""`qtool check` on the embedded network: exit codes, what it prints and writes, and its baseline."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from qtool.pipeline import passes, steps
from qtool.quantizers.prepare import QuantizedModel

QUICK = {
    "data": {"effective_test_size": 0.3, "workers": 0},
    "calibration": {"calib_samples": 16},
    "quantizers": {"mode": "asym_u", "per_channel_weights": True},
}


@pytest.fixture
def gate_file(chdir_tmp: Path) -> Callable[..., Path]:
    """gate_file({"top1_min": 97}, {"drop_max": 1}, judge="point") -> gate.yaml with quick runs r0, r1."""

    def write(*expected: dict, runs: dict | None = None, **settings: object) -> Path:
        bodies = [
            {"name": f"r{number}", "expect": expect, **QUICK, **(runs or {})}
            for number, expect in enumerate(expected)
        ]
        Path("gate.yaml").write_text(json.dumps({**settings, "runs": bodies}, indent=1))  # no YAML aliases
        return Path("gate.yaml")

    return write


def verdicts(path: str = "out.json") -> list[str]:
    report = json.loads(Path(path).read_text())
    return [found["verdict"] for run in report["runs"] for found in run["expectations"]]


def test_a_gate_passes_with_exit_code_0(run_cli, gate_file):
    gate = gate_file({"top1_min": 90, "drop_max": 5, "agreement_min": 90, "logit_sqnr_db_min": 20})
    result = run_cli("check", gate, "--json", "out.json", "--junit", "out.xml")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "4 of 4 expectations pass, on 161 images in 1 runs"
    assert verdicts() == ["pass"] * 4
    suite = ElementTree.parse("out.xml").getroot()[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == ("r0", "4", "0")
    assert {path.name for path in Path().iterdir()} == {"gate.yaml", "out.json", "out.xml"}


def test_a_failure_ends_with_1_and_says_by_how_much(run_cli, gate_file):
    gate = gate_file({"logit_sqnr_db_min": 60, "top1_min": 50})
    result = run_cli("check", gate, "--json", "out.json", "--junit", "out.xml")
    assert result.exit_code == 1
    assert "r0: logit_sqnr_db_min: fail: " in result.stdout
    assert " below 60.000" in result.stdout
    (case,) = ElementTree.parse("out.xml").findall(".//failure/..")
    assert (case.get("classname"), case.get("name")) == ("r0", "logit_sqnr_db_min")


def test_too_few_images_fail_unless_told_otherwise(run_cli, gate_file):
    gate = gate_file({"drop_max": 0.5})
    result = run_cli("check", gate)
    assert result.exit_code == 1
    assert "undecided: 161 images cannot tell" in result.stdout
    assert "images like these would do" in result.stdout
    allowed = run_cli("check", gate, "--allow-undecided", "--junit", "out.xml")
    assert allowed.exit_code == 0
    assert ElementTree.parse("out.xml").find(".//skipped") is not None


def test_sequential_looks_at_fewer_images(run_cli, gate_file):
    gate = gate_file({"top1_min": 60}, runs={"data": {"workers": 0, "batch_size": 16}})
    result = run_cli("check", gate, "--sequential", "--json", "out.json")
    (run,) = json.loads(Path("out.json").read_text())["runs"]
    assert result.exit_code == 0
    assert run["measured"]["images_seen"] < 100
    assert run["inputs"]["images"] == 537


def test_runs_share_calibration_and_the_float_network(run_cli, gate_file, monkeypatch):
    calls = {"calibrate": 0, "float": 0, "quantized": 0}
    calibrate, evaluate = passes.measure, steps.evaluate

    def count_calibrate(*args, **kwargs):
        calls["calibrate"] += 1
        return calibrate(*args, **kwargs)

    def count_evaluate(model, batches, **kwargs):
        calls["quantized" if isinstance(model, QuantizedModel) else "float"] += 1
        return evaluate(model, batches, **kwargs)

    monkeypatch.setattr(passes, "measure", count_calibrate)
    monkeypatch.setattr(steps, "evaluate", count_evaluate)
    gate = gate_file({"top1_min": 50}, {"top1_min": 50}, {"top1_min": 50})
    tree = yaml.safe_load(gate.read_text())
    tree["runs"][0]["quantizers"] = {"bits_weights": 4}
    tree["runs"][1]["run"] = {"seed": 1}  # other images, in between
    gate.write_text(yaml.safe_dump(tree))
    assert run_cli("check", gate).exit_code == 0
    batches = 3  # of 64, in 161 images
    assert calls == {"calibrate": 2, "float": 2 * batches, "quantized": 3 * batches}


def test_a_run_that_cannot_be_made_fails_and_the_others_go_on(run_cli, gate_file):
    gate = gate_file({"top1_min": 50}, {"top1_min": 50})
    tree = yaml.safe_load(gate.read_text())
    tree["runs"][0]["quantizers"]["no_quant_layers"] = "conv99"
    gate.write_text(yaml.safe_dump(tree))
    result = run_cli("check", gate, "--json", "out.json", "--junit", "out.xml")
    assert result.exit_code == 1
    assert "pattern 'conv99': matches no layer" in result.stdout
    assert verdicts() == ["pass"]
    assert ElementTree.parse("out.xml").find(".//error") is not None


def test_a_broken_file_is_reported_before_anything_runs(run_cli, gate_file):
    gate = gate_file({"top1_mim": 50}, {"top1_min": 500})
    result = run_cli("check", gate)
    assert result.exit_code == 1
    assert "unknown key 'top1_mim'; did you mean 'top1_min'" in result.stderr
    assert "500 is not in the range 0<=x<=100" in result.stderr
    assert result.stdout == ""


def test_a_wrong_flag_is_wrong_usage(run_cli, gate_file):
    assert run_cli("check", gate_file({"top1_min": 50}), "--no-such-flag").exit_code == 2


RELATIVE = {"top1_min": "baseline - 4", "drop_max": "baseline + 4", "logit_sqnr_db_min": "baseline - 1"}


def test_a_baseline_is_stored_then_compared_with(run_cli, gate_file):
    gate = gate_file(RELATIVE, baseline="base.json")
    missing = run_cli("check", gate)
    assert missing.exit_code == 1
    assert "run 'r0': not in base.json; store its values with --update-baseline" in missing.stderr
    stored = run_cli("check", gate, "--update-baseline")
    assert stored.exit_code == 0
    assert "  r0: new: top1 " in stored.stdout
    compared = run_cli("check", gate, "--json", "out.json")
    assert (compared.exit_code, verdicts()) == (0, ["pass"] * 3)


def test_changed_inputs_are_reported_and_not_compared(run_cli, gate_file):
    gate = gate_file(RELATIVE | {"agreement_min": 50}, baseline="base.json")
    run_cli("check", gate, "--update-baseline")
    for section, found in (
        ({"run": {"seed": 1}}, "seed: 0 in the baseline, 1 now"),
        ({"data": {"workers": 0, "effective_test_size": 0.1}}, "images: 161 in the baseline, 53 now"),
        ({"model": {"arch": "digits_resnet", "checkpoint": "net.pth"}}, "checkpoint_sha256: None in"),
    ):
        save_float_network(Path("net.pth"))
        gate_file(RELATIVE | {"agreement_min": 50}, baseline="base.json", runs=section)
        result = run_cli("check", gate, "--json", "out.json")
        assert result.exit_code == 1
        assert found in result.stdout
        assert verdicts().count("changed") == 3


def save_float_network(path: Path) -> None:
    import torch

    from qtool.models import load_model

    torch.save(load_model().model.state_dict(), path)


def test_an_update_shows_the_difference_before_it_stores_it(run_cli, gate_file, monkeypatch):
    gate = gate_file(RELATIVE, baseline="base.json")
    run_cli("check", gate, "--update-baseline")
    before = Path("base.json").read_text()
    gate_file(RELATIVE, baseline="base.json", runs={"quantizers": {"bits_weights": 3}})
    shown = []
    monkeypatch.setattr("qtool.cli._print", lambda text: shown.append((text, Path("base.json").read_text())))
    assert run_cli("check", gate, "--update-baseline").exit_code == 0
    text, while_shown = shown[-1]
    assert "r0: top1: " in text
    assert " -> " in text
    assert while_shown == before != Path("base.json").read_text()


def test_an_update_that_lacks_a_run_keeps_the_old_baseline(run_cli, gate_file):
    gate = gate_file(RELATIVE, baseline="base.json")
    run_cli("check", gate, "--update-baseline")
    before = Path("base.json").read_bytes()
    gate_file(RELATIVE, baseline="base.json", runs={"quantizers": {"no_quant_layers": "conv99"}})
    result = run_cli("check", gate, "--update-baseline")
    assert result.exit_code == 1
    assert "base.json: kept as it was" in result.stdout
    assert Path("base.json").read_bytes() == before


@pytest.mark.parametrize("options", [["--sequential"], []])
def test_an_update_that_cannot_be_is_refused(run_cli, gate_file, options):
    gate = gate_file({"top1_min": 50}, **({"baseline": "base.json"} if options else {}))
    result = run_cli("check", gate, "--update-baseline", *options)
    assert result.exit_code == 1
    assert "error: --update-baseline: " in result.stderr


KILL_IN = {
    "the second run": "steps.quantize = after(steps.quantize, 1)",
    "the writing": "pathlib.Path.replace = after(pathlib.Path.replace, 0)",
}
KILLED = """
import os, pathlib, signal, sys
from qtool.cli import main
from qtool.pipeline import passes, steps

def after(function, calls):
    made = []
    def counted(*args, **kwargs):
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(1)
        return function(*args, **kwargs)
    return counted

{patch}
main(["check", "gate.yaml", "--update-baseline"])
"""


@pytest.mark.parametrize("where", KILL_IN)
def test_killed_half_way_it_leaves_the_old_baseline(run_cli, gate_file, where):
    gate = gate_file(RELATIVE, RELATIVE, baseline="base.json")
    run_cli("check", gate, "--update-baseline")
    before = Path("base.json").read_bytes()
    gate_file(RELATIVE, RELATIVE, baseline="base.json", runs={"quantizers": {"bits_weights": 3}})
    script = KILLED.format(patch=KILL_IN[where])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert Path("base.json").read_bytes() == before
    assert run_cli("check", gate, "--json", "out.json").exit_code == 1
    assert "fail" in verdicts()


def test_the_gate_of_this_project_passes(run_cli):
    gate = Path(__file__).parents[1] / "configs" / "ci.yaml"
    result = run_cli("check", gate)
    assert result.exit_code == 0, result.output
