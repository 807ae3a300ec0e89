"""Bits for each layer within a budget, from the settings to a run with them."""

import csv
import json
import logging
import xml.etree.ElementTree as ET

import pytest
import yaml

from qtool.config import load_config
from qtool.errors import ConfigError
from qtool.pipeline.mixed_precision import find_bits
from qtool.pipeline.mixed_precision.plot import COLUMNS, Curve, as_svg, as_text

GRIDS = {"mode": "asym_u", "mode_weights": "sym", "per_channel_weights": True}
QUICK = {"calib_samples": 32, "effective_test_size": 0.2, "workers": 0, "mixed_images": 32}


@pytest.fixture
def find(chdir_tmp):
    """Choose bits for the embedded network; the outcome, and its record."""

    def run(**flags: object):
        outcome = find_bits(load_config(None, **{**GRIDS, **QUICK, "choices": (2, 4, 6, 8), **flags}))
        return outcome, outcome.results["mixed_precision"]

    return run


def sizes() -> dict[str, int]:
    """The weights of the embedded network, by layer."""
    from qtool.config import Config
    from qtool.pipeline.inputs import open_subject
    from qtool.pipeline.mixed_precision.costs import weight_sizes

    return weight_sizes(open_subject(Config()).traced())


def test_an_average_of_bits_is_kept_and_used(find):
    outcome, record = find(mean_bits=5)
    count = sizes()
    bits = record["bits"]
    assert set(bits) == set(count) and set(bits.values()) <= {2, 4, 6, 8} and len(set(bits.values())) > 1
    average = sum(count[name] * bits[name] for name in count) / sum(count.values())
    assert 4.5 < average <= 5 and record["budget"]["used"] == pytest.approx(average)
    settings = yaml.safe_load((outcome.folder / "mixed.yaml").read_text())["quantizers"]
    assert {name: own["bits_weights"] for name, own in settings["overrides"].items()} == bits


def test_the_run_with_the_bits_has_them(find):
    outcome, record = find(mean_bits=5)
    params = yaml.safe_load((outcome.folder / record["run"] / "layer_quant_params.yaml").read_text())
    found = {name: own["weight"]["num_bits"] for name, own in params.items() if own.get("weight")}
    assert found == record["bits"]
    assert outcome.results["logit_sqnr_db"] > 15 and "top-1" in outcome.text


def test_quantize_takes_the_file(find, run_cli, chdir_tmp):
    outcome, _ = find(mean_bits=5)
    again = run_cli("quantize", "-c", outcome.folder / "mixed.yaml", "--calib-samples", 32, "-j", 0,
                    "--effective-test-size", 0.2, "-o", "again")  # fmt: skip
    assert again.exit_code == 0, again.output
    (path,) = chdir_tmp.glob("again/*/results.json")
    assert json.loads(path.read_text())["logit_sqnr_db"] == pytest.approx(outcome.results["logit_sqnr_db"])


def test_a_share_of_the_size_counts_all_weights_in_float32(find):
    _, record = find(size_budget=0.15)
    count = sizes()
    share = sum(count[name] * bits for name, bits in record["bits"].items()) / sum(count.values()) / 32
    assert 0.13 < share <= 0.15 and record["budget"]["used"] == pytest.approx(share)


def test_weights_left_in_float_spend_the_budget_too(find):
    _, record = find(size_budget=0.3, no_quant_layers=("fc",))
    count = sizes()
    spent = 32 * count["fc"] + sum(count[name] * bits for name, bits in record["bits"].items())
    assert "fc" not in record["bits"]
    assert record["budget"]["used"] == pytest.approx(spent / sum(count.values()) / 32)


def test_bit_operations_of_eight_bits_are_all_of_them(find):
    _, record = find(bops_budget=1.0, choices=(4, 8))
    assert set(record["bits"].values()) == {8} and record["budget"]["used"] == pytest.approx(1.0)


def test_outputs_can_be_chosen_too(find):
    outcome, record = find(bops_budget=0.4, mixed_activations=True)
    outputs = {name for name in record["bits"] if name.endswith("(output)")}
    assert {"conv1 (output)", "layer1.add (output)"} <= outputs and 0.3 < record["budget"]["used"] <= 0.4
    overrides = yaml.safe_load((outcome.folder / "mixed.yaml").read_text())["quantizers"]["overrides"]
    assert overrides["conv1"]["bits_activations"] == record["bits"]["conv1 (output)"]
    assert "bits_weights" not in overrides["layer1.add"]
    assert outcome.results["logit_sqnr_db"] > 10


def test_the_front_is_written_and_drawn(find):
    outcome, record = find(mean_bits=5)
    with (outcome.folder / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    costs, sqnr = ([float(row[key]) for row in rows] for key in ("cost", "predicted_sqnr_db"))
    assert costs == sorted(costs) and sqnr == sorted(sqnr) and len(rows) > 10
    assert costs[0] == 2 and costs[-1] == 8
    (chosen,) = (row for row in rows if row["chosen"] == "1")
    assert {name: int(chosen[name]) for name in record["bits"]} == record["bits"]
    circles = ET.parse(outcome.folder / "pareto.svg").getroot().iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) >= len(rows) and outcome.text.count("O") >= 1
    with (outcome.folder / "damage.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * len(record["bits"])
    fc = {int(row["bits"]): float(row["sqnr_db"]) for row in table if row["tensor"] == "fc"}
    assert fc[2] < fc[4] < fc[6] < fc[8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mean_bits": 1.5}, r"--mean-bits: 1.5 bits per weight is less than .* at least 2, or fewer bits"),
        ({}, "--bits: one budget is wanted, found none of --size-budget, --mean-bits and --bops-budget"),
        ({"mean_bits": 5, "size_budget": 0.1}, "found --size-budget and --mean-bits; give one"),
        ({"mean_bits": 5, "mixed_activations": True}, "--mixed-activations: --mean-bits counts weights only"),
        ({"mean_bits": 5, "choices": None}, "--bits: which numbers of bits"),
        ({"mean_bits": 5, "dynamic": True}, "leave out --qe-dynamic"),
    ],
)
def test_what_cannot_be_is_refused(find, flags, message):
    with pytest.raises(ConfigError, match=message):
        find(**flags)


@pytest.mark.parametrize("flags", [{"mean_bits": 1.5}, {"size_budget": 0.0624}])
def test_a_hopeless_budget_is_refused_before_calibration(find, chdir_tmp, flags):
    with pytest.raises(ConfigError, match="less than the fewest bits take"):
        find(**flags)
    assert not (chdir_tmp / "logs").exists()


def test_weights_in_float_make_a_budget_too_small_after_all(find):
    with pytest.raises(ConfigError, match=r"--size-budget: 0.07 .* give at least 0\.\d+, or fewer bits"):
        find(size_budget=0.07, no_quant_layers=("fc",))


def test_a_preset_serves_both_the_choice_and_the_run(find, caplog):
    caplog.set_level(logging.INFO, logger="qtool")
    logging.getLogger("qtool").propagate = True
    outcome, _ = find(mean_bits=4, choices=(3, 4, 8), preset="fast")
    settings = yaml.safe_load((outcome.folder / "mixed.yaml").read_text())["quantizers"]
    assert settings["clip_weights"] == "auto"
    assert outcome.results["corrections"]["preset"] == "fast"


CURVE = Curve([(1.0, 10.0), (2.0, 20.0), (3.0, 25.0)], (2.0, 20.0), "x <axis>", "y")


def test_a_curve_in_characters_has_its_ends_at_the_corners():
    lines = as_text(CURVE).splitlines()
    assert lines[0] == "y" and lines[1].startswith("25.0 │") and lines[1].endswith("·")
    assert lines[14].startswith("10.0 │·") and sum(line.count("·") for line in lines) == 2
    assert sum(line.count("O") for line in lines) == 1 and len(lines[1]) <= 6 + COLUMNS + 1


def test_a_curve_of_one_point_can_be_drawn():
    one = Curve([(1.0, 10.0)], (1.0, 10.0), "x", "y")
    assert as_text(one).count("O") == 1 and "nan" not in as_svg(one)


def test_an_svg_is_well_formed_whatever_its_labels():
    assert "x &lt;axis&gt;" in as_svg(CURVE)
    ET.fromstring(as_svg(CURVE))
