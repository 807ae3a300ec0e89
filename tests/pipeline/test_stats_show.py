"""A statistics file as text."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import StatsError
from qtool.numerics.histogram import Histogram
from qtool.pipeline.stats_show import ASCII, BLOCKS, View, bars_of, show


@pytest.fixture
def file(write_stats, images):
    return write_stats("a", images(8))


def test_outputs_and_the_network_input_are_listed_once(file, images, network_stats):
    lines = show(file, (), View(width=200)).splitlines()
    assert [line.split()[0] for line in lines[1:-2:2]] == [
        "conv1.inputs.0", "conv1.output", "relu.output", "fc.output",
    ]  # fmt: skip
    record = network_stats(images(8)).layers["relu"].output
    row = lines[5].split()
    assert row == [
        "relu.output", "0", f"{record.max:.3g}", "0", f"{record.avg_max:.3g}", f"{record.mean:.3g}",
        f"{record.std:.3g}", f"{record.b:.3g}", "384", "1x3x4x4",
    ]  # fmt: skip
    assert lines[-1] == f"4 tensors; {file} has 3 layers"


def test_inputs_are_listed_when_asked_for(file):
    text = show(file, ("fc",), View(form="csv", inputs=True))
    assert [row["tensor"] for row in csv.DictReader(text.splitlines())] == ["fc.inputs.0", "fc.output"]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_lines_fit_the_terminal(file, width):
    lines = show(file, (), View(width=width)).splitlines()[:-2]
    longest = max(len(line) for line in lines)
    assert longest <= max(width, 72)
    bars = next(line for line in lines if "█" in line)
    assert len(bars) == min(longest, width)


def test_heights_are_of_counts_or_of_their_logarithms(file):
    linear, log = (show(file, ("relu",), View(linear=flag)).splitlines() for flag in (True, False))
    assert linear[:1] == log[:1]
    assert linear[-3] != log[-3]
    assert linear[-2].endswith("height: counts")
    assert log[-2].endswith("height: logarithms of counts")


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 60), st.booleans())
def test_bar_is_empty_only_where_nothing_was_counted(inner, width, linear):
    h = Histogram(0, -5, np.array([3, *inner, 7]))
    low, high = h.edges[0], h.edges[-1]
    bars = bars_of(h, low, high, width, View(linear=linear, bars=ASCII))
    counts = h.rebinned(low, high, width)
    assert len(bars) == width
    assert [bar == " " for bar in bars] == [bool(count == 0) for count in counts]
    assert bars[int(counts.argmax())] == ASCII[-1]


def test_both_sets_of_bars_have_as_many_heights():
    assert len(BLOCKS) == len(ASCII) == len(set(ASCII))


def test_constant_tensor_is_one_bar(write_stats):
    file = write_stats("constant", torch.full((4, 3, 4, 4), 2.5))
    line = show(file, ("conv1",), View(width=80)).splitlines()[-3]
    assert line.split() == ["6", "█", "6"]


def test_tensor_without_histogram_says_so(write_stats, images, network_stats):
    stats = network_stats(images(4))
    conv = stats.layers["conv1"]
    bare = replace(conv, output=replace(conv.output, histogram=None))
    file = write_stats("bare", replace(stats, layers=dict(stats.layers) | {"conv1": bare}))
    lines = show(file, ("conv1",), View(width=200)).splitlines()
    assert lines[4] == "  (no histogram)"
    assert "█" in lines[2]


def test_layer_with_nothing_of_its_own_points_to_its_inputs(write_stats, images, network_stats):
    stats = network_stats(images(4))
    fc = replace(stats.layers["fc"], output=None)
    file = write_stats("folded", replace(stats, layers=dict(stats.layers) | {"fc": fc}))
    assert show(file, ("fc",), View()).endswith(
        "these layers have only inputs that other layers give; --inputs lists them"
    )


def test_yaml_and_csv_hold_all_digits(file, images, network_stats):
    record = network_stats(images(8)).layers["fc"].output
    tree = yaml.safe_load(show(file, ("fc",), View(form="yaml")))
    (row,) = csv.DictReader(show(file, ("fc",), View(form="csv")).splitlines())
    for name in ("min", "avg_max", "mean", "std", "b"):
        assert tree["fc.output"][name] == float(row[name]) == getattr(record, name)
    assert tree["fc.output"]["elements"] == int(row["elements"]) == 80
    assert tree["fc.output"]["shape"] == row["shape"] == "1x10"


def test_damaged_histograms_are_refused(file):
    beside = file.with_name("a_histograms.npz")
    beside.write_bytes(beside.read_bytes()[:-20])
    with pytest.raises(StatsError, match="does not belong to"):
        show(file, (), View())


def test_real_files_of_distiller_are_shown(shared_data):
    text = show(shared_data / "distiller" / "resnet18_quant_stats.yaml", ("conv1", "fc"), View(width=200))
    assert text.splitlines()[1].split() == [
        "conv1.inputs.0", "-2.12", "2.64", "-2.02", "2.48", "-0.0264", "1.19", "1", "-", "256x3x224x224",
    ]  # fmt: skip
    assert text.splitlines()[2] == "  (no histogram)"
