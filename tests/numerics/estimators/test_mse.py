"""The search for the smallest squared error: against the error of the values themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.affine import qparams_from_range
from qtool.numerics.estimators.mse import grid_over, histogram_error, mse_range
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import MODES, QuantSpec

GRIDS = [QuantSpec.from_mode(mode, bits) for mode in MODES for bits in (2, 4, 8)]


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


@given(st.sampled_from(MODES), st.booleans(), st.integers(2, 16), st.floats(-5, 0), st.floats(0, 5))
def test_grid_is_the_one_that_tensors_are_quantized_on(mode, unsigned, bits, low, high):
    spec = QuantSpec.from_mode(mode, bits)
    spec = spec.unsigned() if unsigned else spec
    low = 0.0 if spec.mode == "sym_u" else low
    if max(-low, high) < 1e-6:
        return
    q = qparams_from_range(torch.tensor(low), torch.tensor(high), spec)
    scale, smallest, largest = (float(v[0]) for v in grid_over(np.array([low]), np.array([high]), spec))
    assert scale == pytest.approx(float(q.scale), rel=1e-6)
    limits = spec.quant_min - float(q.zero_point), spec.quant_max - float(q.zero_point)
    # A zero point at a tie is rounded by the type that it is computed in.
    assert (smallest, largest) == pytest.approx(limits, abs=1 if spec.num_bits > 8 else 0) or math.isclose(
        abs(low / scale) % 1, 0.5, abs_tol=1e-3
    )


def test_unsigned_symmetric_grids_have_the_range_of_those_without_zero_point(samples):
    h = Histogram.of(samples["R30"])
    for bits in (4, 8):
        asymmetric = mse_range(h, QuantSpec.from_mode("asym_u", bits))[1]
        assert mse_range(h, QuantSpec(bits).unsigned())[1] == pytest.approx(asymmetric, rel=0.02)


@pytest.mark.parametrize("spec", [*GRIDS, QuantSpec(num_bits=11)], ids=str)
@pytest.mark.parametrize(("name", "low", "high"), [("G", -2.0, 3.5), ("R30", 0.0, 5.0), ("Lp", -30.0, 1.0)])
def test_error_of_a_histogram_is_that_of_its_values(samples, squared_error, spec, name, low, high):
    h = Histogram.of(samples[name])
    found = histogram_error(h, column(low), column(high), spec)[0, 0]
    # Only zeros, which are spread over the bin at zero, and fine grids feel the width of the bins.
    rel = 0.12 if spec.num_bits > 8 else 0.02
    assert found == pytest.approx(squared_error(samples[name], low, high, spec), rel=rel)


@pytest.mark.parametrize("mode", MODES)
def test_steps_finer_than_the_bins_are_taken_as_even(samples, squared_error, mode):
    spec = QuantSpec.from_mode(mode, 16)
    found = histogram_error(Histogram.of(samples["G"]), column(-2.0, -9.0), column(3.0, 9.0), spec)[:, 0]
    wanted = [squared_error(samples["G"], *ends, spec) for ends in [(-2, 3), (-9, 9)]]
    assert found.tolist() == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(("row", "bits"), [("mse_8_bits", 8), ("mse_4_bits", 4)])
@pytest.mark.parametrize("name", ["G", "G50", "R", "R30", "Lp"])
def test_threshold_is_the_published_one(published, samples, row, bits, name):
    spec = QuantSpec.from_mode("asym_u" if name.startswith("R") else "sym_restr", bits)
    high = mse_range(Histogram.of(samples[name]), spec)[1]
    # The published ones are a hundredth of the largest value apart, and the minimum is flat.
    assert high == pytest.approx(published[row][name], abs=published["absmax"][name] / 100)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["G", "G50", "R", "R30", "Lp"])
def test_no_other_range_is_much_better(samples, squared_error, spec, name):
    x = samples[name]
    found = squared_error(x, *mse_range(Histogram.of(x), spec), spec)
    low, high = float(x.min().clamp(max=0)), float(x.max())
    shares = [1, 0.8, 0.65, 0.5, 0.35, 0.25, 0.15, 0.08, 0.05]
    pairs = [(a, a) for a in shares] if spec.symmetric else [(a, b) for a in shares for b in shares]
    others = [squared_error(x, low * a, high * b, spec) for a, b in pairs]
    assert found <= 1.01 * min(others)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_range_is_inside_that_of_the_values(samples, spec):
    for x in samples.values():
        h = Histogram.of(x)
        low, high = mse_range(h, spec)
        reach = max(-h.edges[0], h.edges[-1]) if spec.symmetric else 0
        assert min(h.edges[0], -reach, 0) <= low <= 0 <= high <= max(h.edges[-1], reach)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("power", [-20, -1, 7])
def test_scaling_by_a_power_of_two_scales_the_range_exactly(samples, spec, power):
    factor = math.ldexp(1.0, power)
    low, high = mse_range(Histogram.of(samples["G50"]), spec)
    assert mse_range(Histogram.of(samples["G50"] * factor), spec) == (low * factor, high * factor)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_batches_of_the_values_do_not_matter(samples, spec):
    parts = samples["R30"].flip(0).split(33_333)
    merged = Histogram.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(Histogram.of(part))
    assert mse_range(merged, spec) == mse_range(Histogram.of(samples["R30"]), spec)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_zeros_have_a_range(spec):
    low, high = mse_range(Histogram.of(torch.zeros(9)), spec)
    assert -1e-30 < low <= 0 <= high < 1e-30


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize("value", [3.0, -0.7])
def test_a_constant_tensor_is_represented(squared_error, spec, value):
    x = torch.full((10,), value)
    # At worst as far as half a step of a symmetric grid, which saturates so at its upper end.
    found = squared_error(x, *mse_range(Histogram.of(x), spec), spec)
    assert found <= squared_error(x, min(value, 0), max(value, 0), spec) + 1e-6
