"""The files in configs/ load, and their first lines say what they are, how to run them and what they gave."""

import json
import re
from pathlib import Path

import pytest

from qtool.config import check, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.name != "ci.yaml"]
# The same configuration in the table of benchmarks/, which takes more time to measure than a test has.
ROWS = {
    "mobilenet_v2_w8a8": ("mobilenet_v2", "asym_u per-channel"),
    "resnet18_w6a6": ("resnet18", "asym_u per-channel avg except fc 6-bit"),
    "resnet18_w8a8": ("resnet18", "asym_u per-channel"),
    "resnet50_w6a6": ("resnet50", "asym_u per-channel avg except fc 6-bit"),
    "resnet50_w8a8": ("resnet50", "asym_u per-channel"),
    "squeezenet1_1_w8a8": ("squeezenet1_1", "asym_u per-channel"),
}
# An image whose logits are as good as equal may fall otherwise with another version of torch.
TOLERANCE = 0.2
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    """The comments at the top, on one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:first])


def stated(path: Path) -> tuple[float, float]:
    """The accuracies of the float and the quantized network that the header states, in percent."""
    (found,) = re.findall(r"top-1 ([\d.]+) \(float\) -> ([\d.]+),", header(path))
    return float(found[0]), float(found[1])


@every_config
def test_config_loads(path, monkeypatch, tmp_path):
    monkeypatch.setenv("QTOOL_DATA", str(tmp_path))
    check(load_config(path).quantizers)


@every_config
def test_config_says_how_to_run_it(path):
    assert f"qtool quantize -c configs/{path.name}" in header(path)
    assert stated(path)


@every_config
def test_variables_of_a_config_are_explained_where_they_are_not_set(path, run_cli, monkeypatch):
    monkeypatch.delenv("QTOOL_DATA", raising=False)
    if "QTOOL_DATA" not in path.read_text(encoding="utf-8"):
        pytest.skip("it needs no data")
    done = run_cli("quantize", "-c", path)
    assert done.exit_code == 1
    assert all("but QTOOL_DATA is not set; set it, as in" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS)
def test_header_states_what_the_benchmark_measured(name, row):
    table = json.loads((ROOT / "benchmarks" / "seed_table.json").read_text(encoding="utf-8"))
    arch, configuration = row
    path = ROOT / "configs" / f"{name}.yaml"
    found = table[arch][configuration]
    text = header(path)
    assert stated(path) == (round(table[arch]["float"]["top1"], 2), round(found["top1"], 2))
    assert f"difference {found['top1_difference']:+.2f} ± {found['top1_standard_error']:.2f} points" in text
    assert f"{found['agreement']:.1f} % of predictions equal" in text
    assert f"logits SQNR {found['logit_sqnr_db']:.1f} dB" in text


@pytest.mark.parametrize("name", ["resnet18_w6a6", "resnet18_w8a8", "resnet50_w6a6", "resnet50_w8a8"])
def test_licence_of_weights_for_research_is_named(name):
    text = header(ROOT / "configs" / f"{name}.yaml")
    assert "github uber-research/permute-quantize-finetune, under the Uber Non-Commercial License" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem not in ROWS], ids=lambda path: path.stem
)
def test_header_states_what_the_run_gives(path, run_cli, monkeypatch, request):
    if "QTOOL_DATA" in path.read_text(encoding="utf-8"):
        monkeypatch.setenv("QTOOL_DATA", str(request.getfixturevalue("shared_data")))
    done = run_cli("quantize", "-c", path, "-j", "0")
    assert done.exit_code == 0, done.output
    results = json.loads((Path(done.stdout.splitlines()[-1]) / "results.json").read_text())
    found = results["float"]["top1"], results["quantized"]["top1"]
    assert found == pytest.approx(stated(path), abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_config_of_a_large_network_runs(name, run_cli, shared_data, monkeypatch):
    monkeypatch.setenv("QTOOL_DATA", str(shared_data))
    few = ("--effective-test-size", "0.004", "--calib-samples", "2", "-j", "0")
    done = run_cli("quantize", "-c", ROOT / "configs" / f"{name}.yaml", *few)
    assert done.exit_code == 0, done.output
