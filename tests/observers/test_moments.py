"""One tensor's statistics: what NumPy says of all images at once, however they were batched."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.observers.moments import LONG_ROW, MomentsObserver
from qtool.observers.stats import ActivationStats


def observe(batches: list[Tensor]) -> ActivationStats:
    observer = MomentsObserver()
    for batch in batches:
        observer.update(batch)
    observer.start_second_pass()
    for batch in batches:
        observer.update(batch)
    return observer.stats()


def images(count: int, elements: int, seed: int) -> Tensor:
    return 3 * torch.randn(count, elements, generator=torch.Generator().manual_seed(seed)) + 1


def test_batches_of_equal_values_average_to_their_mean():
    # Distiller's defect D2 gives 1.3636: it weights its history by elements, new data by images.
    stats = observe([torch.full((4, 10), value) for value in (1.0, 3.0, 5.0)])
    assert (stats.avg_min, stats.avg_max, stats.mean) == (3.0, 3.0, 3.0)


def test_statistics_by_hand():
    stats = observe([torch.tensor([[-1.0, 3.0], [-3.0, 5.0]])])
    assert stats == ActivationStats(
        min=-3, max=5, avg_min=-2, avg_max=4, mean=1, std=10**0.5, b=3, shape=(2, 2), total_numel=4
    )


@pytest.mark.parametrize("elements", [1, 7, LONG_ROW - 1, LONG_ROW, LONG_ROW + 1])
def test_statistics_are_those_of_numpy(elements):
    x = images(6, elements, seed=elements)
    rows, stats = x.double().numpy(), observe([x[:4], x[4:]])
    assert (stats.min, stats.max) == (rows.min(), rows.max())
    low, high = (rows.min(1), rows.max(1)) if elements > 1 else (rows.min(), rows.max())
    expected = [np.mean(low), np.mean(high), rows.mean(), rows.std(), np.abs(rows - rows.mean()).mean()]
    # Deviations from the mean are float32.
    found = [stats.avg_min, stats.avg_max, stats.mean, stats.std, stats.b]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert (stats.shape, stats.total_numel) == ((4, elements), 6 * elements)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_how_images_are_batched_does_not_matter(count, elements, seed, data):
    x = images(count, elements, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, count))) | {count})
    split = observe(list(x.tensor_split(cuts)[: len(cuts)]))
    whole = observe([x])
    assert (split.min, split.max, split.total_numel) == (whole.min, whole.max, whole.total_numel)
    for name in ("avg_min", "avg_max", "mean", "std", "b"):
        # Deviations are from a mean that may differ in its last bit.
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=1e-6, abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_averages_lie_inside_the_range(count, elements, seed):
    stats = observe([images(count, elements, seed)])
    assert stats.min <= stats.avg_min <= stats.mean <= stats.avg_max <= stats.max
    assert 0 <= stats.b <= stats.std * (1 + 1e-6)


def test_single_values_take_the_range_over_the_images():
    stats = observe([torch.tensor([[1.0], [4.0]]), torch.tensor([[-2.0]])])
    assert (stats.avg_min, stats.avg_max) == (-2.0, 4.0)


def test_scalar_counts_as_one_image():
    assert observe([torch.tensor(2.5)]).total_numel == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_other_types_are_taken_as_floats(dtype):
    assert observe([torch.tensor([[1, 3]], dtype=dtype)]).mean == 2.0


def test_channels_last_images_have_the_same_statistics():
    x = images(3, 48, seed=0).reshape(3, 3, 4, 4)
    assert observe([x.contiguous(memory_format=torch.channels_last)]) == observe([x])


def test_the_observed_tensor_is_left_alone():
    x = images(2, 5, seed=0)
    before = x.clone()
    observe([x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        MomentsObserver().update(torch.tensor([[1.0, bad, 2.0]]))


def test_empty_batch_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"empty tensor of shape \(0, 3\)"):
        MomentsObserver().update(torch.ones(0, 3))


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no data was observed"):
        MomentsObserver().stats()
