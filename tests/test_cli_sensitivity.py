"""qtool sensitivity, from the command line to the files."""

import csv
import json
from pathlib import Path

import pytest
import yaml

QUICK = ("--calib-samples", "48", "--effective-test-size", "0.1", "-j", "0", "--images", "24")


@pytest.fixture
def run(run_cli):
    """Run the command, which must end well: its text, what it wrote as YAML, and its folder."""

    def run(*args: object):
        result = run_cli("sensitivity", *QUICK, *args)
        assert result.exit_code == 0, result.output
        folder = Path(result.stdout.splitlines()[-1])
        return result.stdout, yaml.safe_load((folder / "sensitivity.yaml").read_text()), folder

    return run


def groups_in(found: dict, **wanted: object) -> list[str]:
    rows = [row for row in found["groups"] if all(row[key] == value for key, value in wanted.items())]
    return [row["group"] for row in rows]


def test_the_table_and_the_files_say_the_same_worst_first(run):
    text, found, folder = run("--qe-mode", "asym_u")
    rows = found["groups"]
    assert [r["sqnr_db"] for r in rows] == sorted(r["sqnr_db"] for r in rows) and len(rows) == 10
    assert {r["how"] for r in rows} == {"estimated"} and found["images"] == 24
    with (folder / "sensitivity.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [r["group"] for r in written] == [r["group"] for r in rows]
    assert [float(r["sqnr_db"]) for r in written] == pytest.approx([r["sqnr_db"] for r in rows])
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("group")) + 1
    assert lines[first].startswith(rows[0]["layers"][0]) and lines[first].count("█") == 30
    assert lines[first + 9].startswith(rows[-1]["layers"][0])


def test_layers_are_measured_one_by_one(run):
    _, found, _ = run("--per", "layer")
    assert {"conv1", "layer1.conv2", "fc"} <= set(groups_in(found))


def test_what_is_measured_is_what_a_quantized_run_gives(run, run_cli, chdir_tmp):
    # The calibration images are the evaluation images, and all others are left in float.
    images = ("--calib-samples", "24", "--calib-split", "evaluation", "--seed", "3")
    _, found, _ = run("--exact", *images, "--per", "layer", "--qe-mode", "asym_u")
    (fc,) = (row for row in found["groups"] if row["group"] == "fc")
    again = run_cli(
        "sensitivity", *QUICK, *images, "--exact", "--qe-mode", "asym_u", "--qe-no-quant-layers", "^(?!fc$).*"
    )
    assert again.exit_code == 0, again.output
    (path,) = sorted(chdir_tmp.glob("logs/*/sensitivity.yaml"))[-1:]
    (alone,) = yaml.safe_load(path.read_text())["groups"]
    assert alone["sqnr_db"] == pytest.approx(fc["sqnr_db"], abs=1e-6) and fc["how"] == "measured"


def test_gain_and_damage_at_several_bits(run):
    text, found, _ = run("--bits", "8,4", "--direction", "both", "--qe-mode", "asym_u")
    for bits in (8, 4):
        damage = groups_in(found, bits=bits, direction="damage")
        assert set(damage) == set(groups_in(found, bits=bits, direction="gain")) and len(damage) == 10
    mean = {
        bits: sum(r["sqnr_db"] for r in found["groups"] if r["bits"] == bits and r["direction"] == "damage")
        for bits in (8, 4)
    }
    assert 8 * 10 < mean[8] - mean[4] < 40 * 10  # about 6 dB a bit
    assert "gain when only this is left in float, else 4 bits" in text


@pytest.mark.parametrize("by", ["kl", "loss", "top1"])
def test_other_metrics_sort_by_themselves(run, by):
    _, found, _ = run("--by", by, "--bits", "3", "--qe-mode", "asym_u")
    values = [row[by] for row in found["groups"]]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_the_overrides_for_the_worst_are_a_file_that_quantize_takes(run, run_cli, chdir_tmp):
    text, found, folder = run("--qe-mode", "asym_u", "--bits", "4", "--worst", "2", "--per", "layer")
    worst = {name for row in found["groups"][:2] for name in row["layers"]}
    file = yaml.safe_load((folder / "worst.yaml").read_text())["quantizers"]
    assert set(file["overrides"]) == worst and file["mode"] == "asym_u"
    block = text[text.index("quantizers:\n") :].rpartition("\n")[0].rpartition("\n")[0]
    assert yaml.safe_load(block) == {"quantizers": {"overrides": file["overrides"]}}
    quick = ("--calib-samples", "48", "--effective-test-size", "0.1", "-j", "0", "--qe-bits-acts", "4")
    sqnr = []
    for more in (("--qe-mode", "asym_u"), ("-c", folder / "worst.yaml")):
        result = run_cli("quantize", *quick, "--qe-bits-wts", "4", *more, "-o", f"runs{len(sqnr)}")
        assert result.exit_code == 0, result.output
        (path,) = chdir_tmp.glob(f"runs{len(sqnr)}/*/results.json")
        sqnr.append(json.loads(path.read_text())["logit_sqnr_db"])
    assert sqnr[1] > sqnr[0] + 0.5


def test_the_worst_of_eight_bits_are_left_in_float(run):
    _, found, folder = run("--worst", "1")
    overrides = yaml.safe_load((folder / "worst.yaml").read_text())["quantizers"]["overrides"]
    assert set(overrides) == set(found["groups"][0]["layers"])
    assert {bits for own in overrides.values() for bits in own.values()} == {0}


def test_a_preset_lends_its_estimators(run_cli, chdir_tmp):
    result = run_cli("sensitivity", *QUICK, "--preset", "fast", "--bits", "4")
    assert result.exit_code == 0 and "its estimators" in result.stderr
    plain = run_cli("sensitivity", *QUICK, "--bits", "4")
    assert plain.stdout.splitlines()[3] != result.stdout.splitlines()[3]


def test_a_stats_file_serves(run, run_cli, chdir_tmp):
    _, first, folder = run()
    _, second, _ = run("--qe-stats-file", folder / "acts_quantization_stats.yaml")
    assert first["groups"] == second["groups"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--qe-dynamic",), "sensitivity: measures static ranges; leave out --qe-dynamic"),
        (("--corrections", "gptq"), "--corrections: single layers are measured without corrections"),
        (("--exact", "--by", "loss"), "--exact: --by loss is always measured"),
        (("--confusion",), "--confusion: sensitivity evaluates nothing for it; leave it out"),
        (("--qe-no-quant-layers", ".*"), "all layers stay in float"),
        (("--qe-no-quant-layers", "nothing"), "matches no layer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(run_cli, chdir_tmp, args, message):
    result = run_cli("sensitivity", *QUICK, *args)
    assert result.exit_code == 1 and message in result.stderr
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.output


@pytest.mark.parametrize("value", ["1", "8,17", "x", ""])
def test_bits_that_are_none_are_wrong_usage(run_cli, value):
    assert run_cli("sensitivity", "--bits", value).exit_code == 2


@pytest.mark.slow
def test_of_resnet18_on_real_images(run_cli, chdir_tmp, shared_data):
    result = run_cli(
        *("sensitivity", "-a", "resnet18", "--checkpoint", shared_data / "weights" / "resnet18.pth"),
        *("--classes", shared_data / "imagenet-classes.txt", "--calib-samples", "16", "--images", "8"),
        *("--qe-mode", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel", "--per", "layer", "-j", "0"),
        *("--effective-test-size", "0.02", shared_data / "imagenet-nips2017"),
    )
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.splitlines()[-1])
    rows = yaml.safe_load((folder / "sensitivity.yaml").read_text())["groups"]
    assert len(rows) == 31 and all(30 < row["sqnr_db"] < 65 for row in rows)


@pytest.mark.parametrize("workers", ["2", "ray:2"])
def test_workers_measure_the_same_as_one_process(run, workers):
    if workers.startswith("ray"):
        pytest.importorskip("ray")
    asked = ("--exact", "--direction", "both", "--bits", "8,4", "--qe-mode", "asym_u")
    _, serial, _ = run(*asked)
    _, parallel, _ = run(*asked, "--workers", workers)
    assert [
        {k: pytest.approx(v, rel=1e-5, abs=1e-8) if isinstance(v, float) else v for k, v in row.items()}
        for row in serial["groups"]
    ] == parallel["groups"]


def test_workers_for_an_estimate_are_refused(run_cli):
    result = run_cli("sensitivity", *QUICK, "--workers", "2")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --workers: the damage of all groups is estimated at once")
