"""Mean and spread of a chunk against float64's, in every way they are measured, compiled and not."""

import numpy as np
import pytest
import torch

from qtool.observers import scan
from qtool.observers.moments import TOGETHER, Moments, mean_of, measure
from qtool.observers.rows import Rows, as_rows
from qtool.observers.scan import ROW, WIDE


def of_float64(x):
    wide = x.double()
    return float(wide.mean()), float((wide - wide.mean()).square().sum())


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 100, WIDE, 3 * WIDE + 17, ROW + 1, TOGETHER + 5, 2 * TOGETHER])
@pytest.mark.parametrize("shift", [0.0, 3.0, 50.0])
def test_moments_are_those_of_float64(count, shift):
    x = normal(count) + shift
    found = measure(Rows(x.reshape(1, 1, -1), False, 1)).moments
    mean, squares = of_float64(x)
    assert found.count == count
    assert found.mean == pytest.approx(mean, abs=1e-6 * (1 + shift))
    assert found.squares == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_a_clamp_is_measured_before_and_after_and_written_over_the_values(shift):
    x = normal(4, 3, 20, 20) + shift
    rows = as_rows(x.clone().contiguous(memory_format=torch.channels_last), 4, 0, 1)
    found = measure(rows, limits=(0.0, shift + 0.5))
    for moments, values in ((found.moments, x), (found.clamped, x.clamp(0.0, shift + 0.5))):
        mean, squares = of_float64(values)
        assert moments.mean == pytest.approx(mean, rel=1e-5)
        assert moments.squares == pytest.approx(squares, rel=1e-5)
    np.testing.assert_array_equal(found.extremes.channel_max, x.amax((0, 2, 3)))
    assert torch.equal(rows.values.flatten(1).sort().values, x.clamp(0, shift + 0.5).flatten(1).sort().values)


def test_squares_beyond_float32_are_measured_in_float64_where_a_clamp_follows_too():
    x = normal(2, 8, 5, 5) * 1e25
    mean, squares = of_float64(x)
    found = measure(as_rows(x, 2, 0, 1), limits=(0.0, 6.0))
    assert (found.moments.mean, found.moments.squares) == (pytest.approx(mean), pytest.approx(squares))
    assert found.clamped.mean == pytest.approx(6 * 0.5, abs=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_squares(value):
    x = normal(2, 8, 5, 5)
    x[1, 2, 3, 4] = value
    assert not np.isfinite(measure(as_rows(x, 2, 0, 1)).moments.squares)


def test_parts_that_differ_add_up():
    # The first half lies close together, far from zero; the second's squares are beyond float32.
    x = torch.cat([normal(TOGETHER) * 1e-3 + 7, normal(TOGETHER), normal(TOGETHER) * 1e20])
    found = measure(Rows(x.reshape(3, 1, -1), False, 3)).moments
    assert found.squares == pytest.approx(of_float64(x)[1], rel=1e-5)


def test_without_a_compiler_the_same_is_found(monkeypatch):
    x = normal(3, 40, 9, 11).contiguous(memory_format=torch.channels_last)
    compiled = measure(as_rows(x.clone(), 3, 0, 1), limits=(-0.5, 0.5))

    def refuse(_function):
        raise OSError("could not get source code")

    monkeypatch.setattr(torch.jit, "script", refuse)
    scan.compiled.cache_clear()
    try:
        plain = measure(as_rows(x.clone(), 3, 0, 1), limits=(-0.5, 0.5))
        assert scan.compiled(scan.scan) is scan.scan
    finally:
        scan.compiled.cache_clear()
    assert (plain.moments, plain.clamped) == (compiled.moments, compiled.clamped)
    np.testing.assert_array_equal(plain.extremes.channel_min, compiled.extremes.channel_min)


def test_the_number_of_threads_changes_nothing():
    x = normal(8, 64, 56, 56).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(measure(as_rows(x, 8, 0, 1)).moments)
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("x", "mean"), [(torch.zeros(0), 0.0), (torch.tensor([1.0, 4.0]), 2.5)])
def test_a_mean_is_of_all_elements(x, mean):
    assert mean_of(x) == mean


def test_the_mean_of_what_is_not_finite_is_no_pivot():
    assert mean_of(torch.tensor([1.0, float("inf")])) == 0.0


def test_moments_of_parts_are_those_of_all():
    x, y = normal(50), 3 + normal(70)
    parts = [Moments(len(v), *of_float64(v)) for v in (x, y)]
    mean, squares = of_float64(torch.cat([x, y]))
    assert Moments.of_all(parts).mean == pytest.approx(mean)
    assert Moments.of_all(parts).squares == pytest.approx(squares)
