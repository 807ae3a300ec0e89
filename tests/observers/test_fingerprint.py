"""The fingerprint of a stats file (E9): written, read back, and what differs in words."""

from dataclasses import replace

import pytest
import yaml

from qtool.errors import StatsError
from qtool.observers.files import read_stats
from qtool.observers.fingerprint import (
    HEADER,
    Fingerprint,
    differences_of_images,
    fingerprint_tree,
    read_fingerprint,
)
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats
from qtool.observers.stats_yaml import write_stats

STEPS = {"resize": 256, "crop": None, "mean": (0.5, 0.25), "interpolation": "bilinear"}
FULL = Fingerprint(((3, 224, 224),), "abc", "def", "123", STEPS)
BARE = Fingerprint(((3, 8, 8), (5,)), "abc", "def")


@pytest.mark.parametrize("fingerprint", [FULL, BARE])
def test_a_fingerprint_comes_back_from_its_file(fingerprint, tmp_path):
    record = ActivationStats(-1.0, 1.0)
    stats = ModelStats({"conv": LayerStats({0: record}, record)}, fingerprint=fingerprint)
    path = tmp_path / "s.yaml"
    path.write_text(write_stats(stats))
    assert read_stats(path) == replace(stats, source=str(path))
    assert read_fingerprint(yaml.safe_load(yaml.safe_dump(fingerprint_tree(fingerprint)))) == fingerprint


def test_a_file_without_one_is_read_as_before(tmp_path):
    path = tmp_path / "distiller.yaml"
    path.write_text("conv: {output: {min: -1, max: 1}}\n")
    assert read_stats(path).fingerprint is None
    assert HEADER not in write_stats(read_stats(path))


def test_other_keys_of_the_header_are_left_to_newer_versions(tmp_path):
    tree = {HEADER: {"later": "h.npz", "fingerprint": {**fingerprint_tree(FULL), "more": 1}}}
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**tree, "conv": {"output": {"min": -1, "max": 1}}}))
    assert read_stats(path).fingerprint == FULL


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (3, ".qtool: found int 3; a mapping is wanted"),
        ({"fingerprint": []}, ".qtool.fingerprint: a mapping with inputs, names and sizes is wanted"),
        ({"fingerprint": {"names": 3}}, ".qtool.fingerprint: names: found 3; a text is wanted"),
        (
            {"fingerprint": {"names": "a", "sizes": "b", "inputs": ["(2,", 3]}},
            ".qtool.fingerprint: inputs: found ['(2,', 3]; shapes such as (3, 224, 224) are wanted",
        ),
        (
            {"fingerprint": {"names": "a", "sizes": "b", "inputs": [], "preprocessing": 7}},
            ".qtool.fingerprint: preprocessing: found 7; a mapping is wanted",
        ),
    ],
)
def test_a_damaged_header_is_one_line(header, message, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({HEADER: header, "conv": {"output": {"min": -1, "max": 1}}}))
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    assert str(caught.value) == f"{path}: {message}"


def test_e9_differences_of_images_are_named_with_both_values():
    other = {**STEPS, "crop": 192, "mean": (0.5, 0.5)}
    here = replace(FULL, inputs=((3, 192, 192),), preprocessing=other)
    assert differences_of_images(FULL, here) == [
        "crop none (here 192)",
        "inputs 3x224x224 (here 3x192x192)",
        "mean 0.5,0.25 (here 0.5,0.5)",
    ]


def test_what_is_not_said_is_no_difference():
    assert differences_of_images(replace(FULL, preprocessing=None), FULL) == []
    newer = replace(FULL, preprocessing={**STEPS, "antialias": True})
    assert differences_of_images(newer, FULL) == []
