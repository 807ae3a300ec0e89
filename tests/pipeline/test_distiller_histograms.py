"""Histograms in Distiller's form: its layout, and the counts that it would have found."""

import pytest
import torch

from qtool.numerics.histogram import Histogram
from qtool.observers.stats import ActivationStats
from qtool.pipeline.distiller_histograms import BINS, histogram, save_histograms


def record(x: torch.Tensor, numel: int | None = None) -> ActivationStats:
    return ActivationStats(
        float(x.min()), float(x.max()), total_numel=numel or x.numel(), histogram=Histogram.of(x)
    )


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_second_pass_within_a_bin(seed):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(seed)).mul(3).add(seed)
    if seed == 2:
        x = x.relu()
    found = histogram(record(x))
    theirs = torch.histc(x.double(), BINS, float(x.min()), float(x.max()))
    assert found["hist"].dtype == torch.float32
    assert float(found["hist"].sum()) == pytest.approx(x.numel(), rel=1e-5)
    # At each edge the counts below differ by less than what one of qtool's bins holds.
    off = (found["hist"].double().cumsum(0) - theirs.cumsum(0)).abs().max()
    assert off <= record(x).histogram.counts[1:].max() + 1
    assert off > 0


def test_centroids_are_the_middles_of_the_bins():
    found = histogram(record(torch.linspace(-1, 3, 5000)))
    half = 4 / BINS / 2
    torch.testing.assert_close(found["bin_centroids"], torch.linspace(-1 + half, 3 - half, BINS))


def test_a_sample_is_scaled_to_all_elements():
    x = torch.linspace(-1, 1, 1000)
    sampled, whole = histogram(record(x, numel=64_000)), histogram(record(x))
    torch.testing.assert_close(sampled["hist"], 64 * whole["hist"])


def test_constant_tensor_has_one_bin():
    found = histogram(record(torch.full((30,), 2.0)))
    assert float(found["hist"][BINS // 2]) == float(found["hist"].sum()) == 30
    assert found["bin_centroids"].unique().tolist() == [2.0]


def test_record_without_histogram_is_refused():
    with pytest.raises(ValueError, match="without histogram"):
        histogram(ActivationStats(0, 1))


def test_file_has_the_layout_of_distiller(images, network_stats, tmp_path):
    stats = network_stats(images(8))
    path = save_histograms(stats, tmp_path / "acts_histograms.pt")
    tree = torch.load(path, weights_only=True)
    assert list(tree) == ["conv1", "relu", "fc"]
    for name, layer in stats.layers.items():
        for entry, measured in [
            (tree[name]["output"], layer.output),
            *((tree[name]["inputs"][i], r) for i, r in layer.inputs.items()),
        ]:
            assert set(entry) == {"hist", "bin_centroids"}
            torch.testing.assert_close(entry["hist"], histogram(measured)["hist"])
            assert entry["hist"].shape == entry["bin_centroids"].shape == (2048,)


def test_tensor_under_several_names_is_stored_once(images, network_stats, tmp_path):
    path = save_histograms(network_stats(images(8)), tmp_path / "h.pt")
    assert path.stat().st_size < 4 * 2 * 4 * BINS + 10_000  # four tensors, of seven names
