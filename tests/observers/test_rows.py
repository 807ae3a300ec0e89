"""Fast reductions against plain ones, in every layout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.observers.rows import Extremes, as_rows
from qtool.observers.scan import rows_extremes


def extremes(rows):
    """Those of all rows together, as of a single part."""
    low, high = rows_extremes(rows.values, rows.channels_last)
    return Extremes.of_rows(low, high, rows.images)


shapes = st.lists(st.integers(1, 40), min_size=2, max_size=4)


@given(shapes, st.integers(0, 100), st.data())
def test_extremes_are_those_of_images_and_channels(shape, seed, data):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    batch = data.draw(st.integers(0, len(shape) - 1))
    channel = data.draw(st.integers(0, len(shape) - 1).filter(lambda axis: axis != batch))
    if len(shape) == 4 and data.draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    found = extremes(as_rows(x, shape[batch], batch, channel))
    by_image, by_channel = x.movedim(batch, 0).flatten(1), x.movedim(channel, 0).flatten(1)
    np.testing.assert_array_equal(found.image_min, by_image.amin(1))
    np.testing.assert_array_equal(found.image_max, by_image.amax(1))
    np.testing.assert_array_equal(found.channel_min, by_channel.amin(1))
    np.testing.assert_array_equal(found.channel_max, by_channel.amax(1))


@pytest.mark.parametrize("channels", [3, 16, 24, 33, 64])
def test_rows_that_do_not_fill_a_vector_are_reduced_too(channels):
    x = torch.randn(2, channels, 13, 11, generator=torch.Generator().manual_seed(0))
    rows = as_rows(x.contiguous(memory_format=torch.channels_last), 2, 0, 1)
    assert rows.channels_last
    np.testing.assert_array_equal(extremes(rows).channel_max, x.amax((0, 2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_windows_belong_to_their_image(layout):
    windows = torch.randn(2 * 4, 6, 5, 5).contiguous(memory_format=layout)
    found = extremes(as_rows(windows, 2, 0, 1))
    np.testing.assert_array_equal(found.image_max, windows.reshape(2, -1).amax(1))
    np.testing.assert_array_equal(found.channel_max, windows.amax((0, 2, 3)))


def test_a_tensor_without_images_is_one_row():
    x = torch.randn(3, 4)
    found = extremes(as_rows(x, 7, None, 1))
    assert found.image_min.tolist() == [float(x.min())]
    np.testing.assert_array_equal(found.channel_min, x.amin(0))


def test_a_scalar_and_a_vector_have_extremes():
    assert extremes(as_rows(torch.tensor(2.0), 3, None, 0)).image_max.tolist() == [2.0]
    assert extremes(as_rows(torch.tensor([1.0, 5.0]), 2, 0, 0)).image_max.tolist() == [1.0, 5.0]


@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_in_an_image_shows_in_its_extremes(channels_last):
    x = torch.zeros(3, 32, 4, 4)
    x[1, 2, 3, 0] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert np.isnan(extremes(as_rows(x, 3, 0, 1)).image_max).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("elements", "shapes"), [(48, [(2, 4, 6), (2, 4, 6), (1, 4, 6)]), (24, [(1, 4, 6)] * 5)]
)
def test_parts_hold_whole_images_where_they_fit(elements, shapes):
    x = torch.arange(5 * 4 * 6.0).reshape(5, 4, 6)
    parts = as_rows(x, 5, 0, 2).parts(elements)
    assert [tuple(part.shape) for part in parts] == shapes
    assert torch.equal(torch.cat([part.flatten() for part in parts]), x.flatten())


def test_a_large_image_is_cut_into_equal_parts():
    x = torch.randn(2, 7, 8, 6).contiguous(memory_format=torch.channels_last)
    rows = as_rows(x, 2, 0, 1)
    parts = rows.parts(100)
    assert [tuple(part.shape) for part in parts] == [(1, 12, 7)] * 8
    lows, highs = zip(*(rows_extremes(part, True) for part in parts), strict=True)
    found = Extremes.of_rows(torch.cat(lows), torch.cat(highs), images=2)
    np.testing.assert_array_equal(found.image_max, x.flatten(1).amax(1))
    np.testing.assert_array_equal(found.channel_min, x.amin((0, 2, 3)))
