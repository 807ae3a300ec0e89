"""One tensor's statistics: what NumPy says of all images at once, however they were put in chunks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.observers.moments import TOGETHER
from qtool.observers.rows import as_rows
from qtool.observers.scan import WIDE
from qtool.observers.stats import ActivationStats
from qtool.observers.sums import TensorSums
from qtool.observers.tensor import SAMPLE, Chunk, NotFinite, TensorObserver


def sums(
    chunks: list[Tensor], pivot: float | None = None, start: int = 0, step: int = 1, size: int | None = None
) -> TensorSums:
    """What an observer gathers of (size, ...) tensors that are chunks number start, start + step, ..."""
    observer = TensorObserver((1, *chunks[0].shape[1:]), pivot)
    size = size or len(chunks[0])
    for index, x in enumerate(chunks):
        number = start + index * step
        rows = as_rows(x.float(), len(x), 0, min(1, x.dim() - 1))
        observer.update(rows, Chunk(number, number * size, len(x)))
    found = observer.sums()
    assert found is not None
    return found


def observe(chunks: list[Tensor]) -> ActivationStats:
    return sums(chunks).stats()


def images(count: int, elements: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, elements, generator=torch.Generator().manual_seed(seed)) + 1


def test_chunks_of_equal_values_average_to_their_mean():
    # Distiller's defect D2 gives 1.3636: it weights its history by elements, new data by images.
    stats = observe([torch.full((4, 10), value) for value in (1.0, 3.0, 5.0)])
    assert (stats.avg_min, stats.avg_max, stats.mean) == (3.0, 3.0, 3.0)


def test_statistics_by_hand():
    stats = observe([torch.tensor([[-1.0, 3.0], [-3.0, 5.0]])])
    assert stats == ActivationStats(
        min=-3, max=5, avg_min=-2, avg_max=4, mean=1, std=10**0.5, b=3, shape=(1, 2), total_numel=4
    )
    assert (stats.image_min.tolist(), stats.image_max.tolist()) == ([-1, -3], [3, 5])
    assert (stats.channel_min.tolist(), stats.channel_max.tolist()) == ([-3, 3], [-1, 5])
    assert stats.histogram.total == 4


@pytest.mark.parametrize("elements", [1, 7, WIDE - 1, WIDE, SAMPLE + 1, TOGETHER // 2 + 5])
def test_statistics_are_those_of_numpy(elements):
    x = images(6, elements, seed=elements)
    rows, stats = x.double().numpy(), observe([x[:4], x[4:]])
    assert (stats.min, stats.max) == (rows.min(), rows.max())
    low, high = (rows.min(1), rows.max(1)) if elements > 1 else (rows.min(), rows.max())
    expected = [np.mean(low), np.mean(high), rows.mean(), rows.std()]
    # Sums of a few thousand elements are float32.
    found = [stats.avg_min, stats.avg_max, stats.mean, stats.std]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (stats.shape, stats.total_numel) == ((1, elements), 6 * elements)


@given(st.integers(2, 60), st.integers(1, 20), st.floats(-3, 3), st.integers(0, 2**31))
def test_b_is_as_near_to_its_two_pass_value_as_the_bound_says(count, elements, drift, seed):
    # The first chunk's mean is off, so that b has to be moved by more than half a standard deviation.
    x = images(count, elements, seed)
    x[: count // 2] += drift
    found = sums([x[: count // 2], x[count // 2 :]])
    stats = found.stats()
    two_pass = np.abs(x.double().numpy() - x.double().numpy().mean()).mean()
    cuts = np.sort(x.double().numpy().reshape(-1))
    h = stats.histogram
    ranks = np.arange(len(cuts) + 1) / len(cuts)
    off = max(max(abs(h.cdf(c) - ranks[i]), abs(h.cdf(c) - ranks[i + 1])) for i, c in enumerate(cuts))
    bound = 2 * abs(stats.mean - found.pivot) * off
    assert abs(stats.b - two_pass) <= bound + 1e-6


def test_b_of_a_sampled_tensor_is_near_its_two_pass_value():
    x = torch.randn(64, 3, 100, 100, generator=torch.Generator().manual_seed(0)).abs()
    x *= torch.linspace(0.5, 2, 64).reshape(-1, 1, 1, 1)  # the first chunk's mean is half the mean
    found = sums(list(x.split(8)))
    stats = found.stats()
    assert 64 * SAMPLE <= stats.histogram.total < 64 * SAMPLE * 1.1
    between = torch.linspace(found.pivot, stats.mean, 100)
    off = max(abs(stats.histogram.cdf(float(t)) - float((x < t).double().mean())) for t in between)
    wanted = float((x.double() - x.double().mean()).abs().mean())
    # The standard error of a mean of so many deviations is 0.1 % of b.
    assert abs(stats.b - wanted) <= 0.004 * wanted
    assert off < 0.005
    assert float(stats.histogram.quantile(0.99)) == pytest.approx(float(np.quantile(x, 0.99)), rel=0.02)


@pytest.mark.parametrize("channels", [16, 32, 96, 160, 480])
def test_a_sample_has_all_channels_that_lie_side_by_side(channels):
    x = torch.arange(channels).repeat(2, 56, 56, 1).float().movedim(-1, 1)
    counts = sums([x]).stats().histogram.counts
    assert len(counts[counts > 0]) == channels
    assert counts[counts > 0].min() > 0.6 * counts.max()


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_averages_lie_inside_the_range(count, elements, seed):
    stats = observe([images(count, elements, seed)])
    assert stats.min <= stats.avg_min <= stats.mean <= stats.avg_max <= stats.max
    assert 0 <= stats.b <= stats.std


def assert_equal(a: TensorSums, b: TensorSums) -> None:
    first, second = a.stats(), b.stats()
    assert first == second
    for name in ("image_min", "image_max", "channel_min", "channel_max"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert (first.histogram.exponent, first.histogram.first) == (
        second.histogram.exponent,
        second.histogram.first,
    )
    np.testing.assert_array_equal(first.histogram.counts, second.histogram.counts)


@given(st.integers(2, 5), st.integers(1, 3), st.sampled_from([1, 30, SAMPLE + 100]), st.integers(0, 2**31))
def test_parts_merge_to_what_one_observer_gathers(chunks, ranks, elements, seed):
    x = images(chunks * 4 - 1, elements, seed) * 10 ** torch.linspace(-2, 2, chunks * 4 - 1).reshape(-1, 1)
    parts = list(x.split(4))
    whole = sums(parts)
    merged = [sums(parts[r::ranks], whole.pivot, r, ranks, size=4) for r in range(ranks) if parts[r::ranks]]
    while len(merged) > 1:
        merged.append(merged.pop().merge(merged.pop()))
    assert_equal(merged[0], whole)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(2, 3))
def test_parts_of_sequences_of_several_lengths_merge_to_what_one_observer_gathers(lengths, ranks):
    generator = torch.Generator().manual_seed(sum(lengths))
    parts = [torch.randn(4, length, 6, generator=generator) for length in lengths]
    whole = sums(parts)
    merged = [sums(parts[r::ranks], whole.pivot, r, ranks, size=4) for r in range(ranks) if parts[r::ranks]]
    while len(merged) > 1:
        merged.append(merged.pop().merge(merged.pop()))
    assert_equal(merged[0], whole)


def test_sums_of_other_dimensions_do_not_merge():
    a = sums([images(2, 3, 0)], pivot=0.0)
    b = sums([torch.ones(2, 3, 3)], pivot=0.0)
    with pytest.raises(ValueError, match="not of one tensor"):
        a.merge(b)


def test_sums_about_different_values_do_not_merge():
    a, b = sums([images(2, 3, 0)]), sums([images(2, 3, 1)])
    with pytest.raises(ValueError, match="not of one tensor"):
        a.merge(b)


def test_averages_over_groups_take_the_range_of_each():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [10.0, 0.0], [1.0, -4.0], [2.0, 0.0]])
    stats = sums(list(x.split(2))).stats(group=2)
    assert (stats.avg_max, stats.avg_min) == ((3 + 10 + 2) / 3, (0 - 4 + 0) / 3)


def test_single_values_take_the_range_over_the_images():
    stats = observe([torch.tensor([[1.0], [4.0]]), torch.tensor([[-2.0]])])
    assert (stats.avg_min, stats.avg_max) == (-2.0, 4.0)


def test_a_layer_that_is_called_twice_for_the_same_images_has_one_range_of_each():
    observer = TensorObserver((1, 2))
    for values in ([[1.0, 2.0], [3.0, 4.0]], [[-1.0, 0.0], [3.0, 9.0]]):
        observer.update(as_rows(torch.tensor(values), 2, 0, 1), Chunk(0, 0, 2))
    stats = observer.sums().stats()
    assert (stats.image_min.tolist(), stats.image_max.tolist()) == ([-1.0, 3.0], [2.0, 9.0])
    assert (stats.mean, stats.total_numel) == (21 / 8, 8)


def test_values_whose_squares_exceed_float32_have_statistics():
    x = images(4, WIDE, seed=1) * 1e25
    assert observe([x]).std == pytest.approx(x.double().numpy().std(), rel=1e-6)


def test_the_observed_tensor_is_left_alone():
    x = images(2, 5, seed=0)
    before = x.clone()
    observe([x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_image_whose_values_are_not_finite_is_named(bad):
    x = images(5, 3, seed=0)
    x[3, 1] = bad
    with pytest.raises(NotFinite, match="NaN or infinity") as caught:
        sums([images(5, 3, seed=1), x])
    assert caught.value.image == 8


def test_what_is_not_finite_and_has_no_images_is_of_the_first_image_of_its_chunk():
    observer, x = TensorObserver((2, 2)), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.raises(NotFinite) as caught:
        observer.update(as_rows(x, 8, None, 1), Chunk(3, 24, 8))
    assert caught.value.image == 24


def test_empty_chunk_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"empty tensor of shape \(2, 0\)"):
        sums([torch.ones(2, 0)])


def test_nothing_has_no_sums():
    assert TensorObserver((1, 2)).sums() is None


def test_sequences_of_several_lengths_have_one_range_and_no_channels():
    short, long = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    found = sums([short, long, short])
    assert found.channel_min.tolist() == [min(float(short.min()), float(long.min()))]
    assert found.channel_max.tolist() == [max(float(short.max()), float(long.max()))]
    assert found.numel == 2 * 4 * (3 + 5 + 3)
