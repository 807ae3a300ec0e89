"""The file of histograms: what is written is read, once for all its names, and only beside its own YAML."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from qtool.errors import StatsError
from qtool.numerics.histogram import Histogram
from qtool.observers.files import file_contents, read_stats
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats, records
from qtool.observers.stats_yaml import Link, write_stats

VECTORS = ("image_min", "image_max", "channel_min", "channel_max")


def record(seed: int) -> ActivationStats:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * 3
    low, high = x.aminmax(dim=1)
    return ActivationStats(
        float(x.min()),
        float(x.max()),
        shape=(1, 5),
        total_numel=30,
        histogram=Histogram.of(x),
        image_min=low.numpy(),
        image_max=high.numpy(),
        channel_min=x.amin(0).numpy(),
        channel_max=x.amax(0).numpy(),
    )


@pytest.fixture
def stats() -> ModelStats:
    shared, plain = record(0), ActivationStats(-1.0, 2.0)
    flat = replace(shared, shape=(1, 5, 1), channel_min=None, channel_max=None)
    return ModelStats(
        {
            "conv1": LayerStats({0: record(1)}, shared),
            "relu": LayerStats({0: shared}, plain),
            "fc": LayerStats({0: flat, 1: record(2)}, None),
        }
    )


@pytest.fixture
def written(stats, tmp_path):
    text, content = file_contents(stats, "h.npz")
    (tmp_path / "s.yaml").write_text(text)
    (tmp_path / "h.npz").write_bytes(content)
    return tmp_path / "s.yaml"


def assert_same(a: ActivationStats, b: ActivationStats) -> None:
    assert a == b
    for name in VECTORS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.histogram is None) == (b.histogram is None)
    if a.histogram is not None:
        assert (a.histogram.exponent, a.histogram.first) == (b.histogram.exponent, b.histogram.first)
        np.testing.assert_array_equal(a.histogram.counts, b.histogram.counts)


def test_what_is_written_is_read(stats, written):
    found = read_stats(written)
    for (place, a), (other, b) in zip(records(stats), records(found), strict=True):
        assert place == other
        assert_same(a, b)


def test_the_same_statistics_give_the_same_bytes(stats, written):
    assert file_contents(stats, "h.npz") == file_contents(read_stats(written), "h.npz")


def test_a_tensor_with_several_names_is_stored_once(stats, written):
    with np.load(written.parent / "h.npz") as archive:
        assert len(archive["bins"]) == 3
        assert len(archive["lengths"]) == 3 * 4


def test_a_yaml_without_its_histograms_is_read(stats, written):
    (written.parent / "h.npz").unlink()
    found = read_stats(written)
    assert found.layers == stats.layers
    assert found.output("conv1").histogram is None


def test_a_file_of_another_yaml_is_refused(stats, written):
    (written.parent / "h.npz").write_bytes(b"something else")
    with pytest.raises(StatsError, match=r"h\.npz: does not belong to .*s\.yaml"):
        read_stats(written)


def test_a_changed_yaml_keeps_its_histograms(written):
    written.write_text(written.read_text().replace("max: 2.0", "max: 2.5"))
    found = read_stats(written)
    assert found.output("relu").max == 2.5
    assert found.output("conv1").histogram is not None


@pytest.mark.parametrize("damage", [b"", b"no archive", None], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_refused_in_one_line(damage, stats, tmp_path):
    content = file_contents(stats, "h.npz")[1]
    content = content[: len(content) // 2] if damage is None else damage
    (tmp_path / "h.npz").write_bytes(content)
    text = write_stats(stats, Link("h.npz", hashlib.sha256(content).hexdigest()))
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(StatsError, match=r"h\.npz: damaged") as caught:
        read_stats(tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("link", ["[]", "{file: a}", "{file: ../a, sha256: b}", "{file: 1, sha256: b}"])
def test_a_malformed_link_is_refused(link, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(f".qtool: {{histograms: {link}}}\nfc:\n  output: {{min: 0, max: 1}}\n")
    with pytest.raises(StatsError, match=r"\.qtool\.histograms: the name of a file"):
        read_stats(path)
