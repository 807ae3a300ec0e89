"""Statistics remember what they were measured on, and say so when they are used for something else (E9)."""

from pathlib import Path

import numpy as np
import pytest
import yaml

STATS = "acts_quantization_stats.yaml"
NETWORK = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 10))

def make():
    torch.manual_seed({seed})
    return Net()
"""


@pytest.fixture
def network(tmp_path):
    """A network in a file of its own, by the seed of its weights."""

    def write(seed):
        path = tmp_path / f"net{seed}.py"
        path.write_text(NETWORK.format(seed=seed))
        return f"{path}:make"

    return write


@pytest.fixture
def images(tmp_path) -> Path:
    """32 labelled images of 8 x 8 grey values."""
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    pixels = generator.integers(0, 256, (32, 8, 8), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(32) % 10)
    return path


@pytest.fixture
def run(run_cli, network, images):
    """Run a command on these images with the network of a seed; everything else is the same each time."""

    def run(command, *args, seed=0):
        shape = () if "--input-shape" in args else ("--input-shape", "1,8,8")
        return run_cli(command, "-a", network(seed), *shape, "-j", "0", *args, images)

    return run


@pytest.fixture
def stats(run) -> Path:
    """The statistics file of a calibration."""
    result = run("calibrate", "--calib-samples", "16")
    assert result.exit_code == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_e9_a_calibration_says_what_it_measured(stats):
    found = yaml.safe_load(stats.read_text())[".qtool"]["fingerprint"]
    assert found["inputs"] == ["(1, 8, 8)"]
    assert {"names", "sizes", "weights"} <= found.keys()
    assert set(found["preprocessing"]) == {"resize", "crop", "mean", "std", "interpolation"}


def test_e9_statistics_of_the_same_network_and_images_are_used(run, stats):
    result = run("quantize", "--qe-stats-file", stats)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (("--mean", "0.25"), "mean "),
        (("--std", "0.75"), "std "),
        (
            ("--resize", "16", "--crop", "16", "--input-shape", "1,16,16"),
            "crop none (here 16), inputs 1x8x8 (here 1x16x16), resize",
        ),
    ],
)
def test_e9_other_preprocessing_is_refused_unless_told_otherwise(run, stats, changed, difference):
    result = run("quantize", "--qe-stats-file", stats, *changed)
    assert result.exit_code == 1
    message = result.stderr.splitlines()[-1]
    assert f"{stats}: measured on images preprocessed in another way: {difference}" in message
    assert message.endswith("measure again with 'qtool calibrate', or add --qe-stats-as-is")
    result = run("quantize", "--qe-stats-file", stats, *changed, "--qe-stats-as-is")
    assert result.exit_code == 0, result.stderr


def test_e9_other_weights_are_refused_unless_told_otherwise(run, stats):
    result = run("quantize", "--qe-stats-file", stats, seed=1)
    assert result.exit_code == 1
    assert f"{stats}: measured with other weights of this network; measure again" in result.stderr
    assert run("quantize", "--qe-stats-file", stats, "--qe-stats-as-is", seed=1).exit_code == 0


def test_e9_another_network_is_refused_even_so(run_cli, stats):
    result = run_cli("quantize", "--qe-stats-file", stats, "--qe-stats-as-is", "-j", "0")
    assert result.exit_code == 1
    assert f"{stats}: measured on another network: 4 of its layers are not in this one" in result.stderr
    assert list(Path("logs").iterdir()) == [stats.parent]  # no folder of a run that cannot be made


def test_e9_the_search_for_clip_modes_looks_too(run, stats):
    result = run("search-clipping", "--qe-stats-file", stats, seed=1)
    assert result.exit_code == 1
    assert "measured with other weights" in result.stderr


def test_as_is_without_a_file_is_refused(run):
    result = run("quantize", "--qe-stats-as-is")
    assert result.exit_code == 1
    assert "--qe-stats-as-is: has an effect with --qe-stats-file only" in result.stderr
