"""Reports that other programs can read, whatever is in them."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from qtool.config import Config
from qtool.config.gate import Expect, Gate, GateRun, Threshold
from qtool.pipeline.gate.reports import Judged, Report, table, write_json, write_junit


@pytest.fixture
def report(make_judge, evidence) -> Report:
    expected = {"top1_min": 98, "drop_max": 1.5, "logit_sqnr_db_min": 1}
    seen = evidence(losses=20, gains=10, noise=0.0)
    expect = Expect(**{key: Threshold(value) for key, value in expected.items()})
    good = GateRun("a\x01b", Config(), expect, "interval")
    findings = tuple(make_judge(**expected).findings(seen))
    judged = Judged(good, {"seed": 0}, seen, findings=findings, changes=("seed: 1 in the baseline, 0 now",))
    broken = Judged(replace(good, name="broken"), error="net.pth: no \udcff such file")
    return Report(Gate(Path("gate.yaml"), (good,), None, 0.05), (judged, broken), False, False)


def test_table_has_a_line_for_everything(report):
    lines = table(report).splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["fail", "undecided", "pass", "error"]
    assert "a\x01b: differs from the baseline: seed: 1 in the baseline, 0 now" in lines
    assert lines[-1].endswith("on 1000 images in 2 runs; 1 runs could not be made")


def test_json_holds_plain_numbers(report, tmp_path):
    tree = json.loads(write_json(tmp_path / "r.json", report).read_text(), parse_constant=pytest.fail)
    top1, _, sqnr = tree["runs"][0]["expectations"]
    assert (tree["passed"], top1["limit"], top1["verdict"], sqnr["found"]) == (False, 98, "fail", None)
    assert np.mean(top1["bounds"]) == pytest.approx(96, abs=0.5)
    assert tree["runs"][1]["error"] == "net.pth: no \udcff such file"


@pytest.mark.parametrize(("allowed", "failures", "skipped"), [(False, 2, 0), (True, 1, 1)])
def test_junit_counts_as_the_exit_code_does(report, tmp_path, allowed, failures, skipped):
    path = write_junit(tmp_path / "r.xml", replace(report, allow_undecided=allowed))
    first, second = ElementTree.parse(path).getroot()
    assert (first.get("name"), first.get("failures"), first.get("skipped")) == (
        "a?b", str(failures), str(skipped)
    )  # fmt: skip
    assert (len(first.findall(".//failure")), len(first.findall(".//skipped"))) == (failures, skipped)
    assert (second.get("errors"), len(second.findall(".//error"))) == ("3", 3)
