"""The arithmetic agrees with Distiller's worked examples and with torch, and keeps its promises."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qtool.numerics.affine import (
    approximate_multiplier,
    dequantize,
    fake_quantize,
    qparams_from_range,
    quantize,
    quantize_centered,
)
from qtool.numerics.spec import MODES, QParams, QuantSpec

GOLDEN = Path(__file__).parents[1] / "golden"
GRIDS = yaml.safe_load((GOLDEN / "grids.yaml").read_text(encoding="utf-8"))
TORCH_CASES = json.loads((GOLDEN / "fake_quantize.json").read_text(encoding="utf-8"))["cases"]

specs = st.builds(QuantSpec.from_mode, st.sampled_from(MODES), st.integers(2, 16))
values = st.floats(-1e6, 1e6, width=32)
ranges = st.tuples(values, values).map(sorted)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def grid(low: float, high: float, spec: QuantSpec) -> QParams:
    return qparams_from_range(torch.tensor(low), torch.tensor(high), spec)


def inside(low: float, high: float, shares: list[float]) -> Tensor:
    """Values between the ends of a range, the ends and zero among them, as the grid promises to hold them."""
    low, high = min(low, 0.0), max(high, 0.0)
    return torch.tensor([low, high, 0.0, *(low + s * (high - low) for s in shares)]).clamp(low, high)


# Worked examples


@pytest.mark.parametrize(("mode", "num_bits", "low", "high", "steps_per_unit", "zero_point"), GRIDS)
def test_grid_is_that_of_the_worked_example(mode, num_bits, low, high, steps_per_unit, zero_point):
    found = grid(float(low), float(high), QuantSpec.from_mode(mode, num_bits))
    # scale is the float32 nearest to 1 / S up to two roundings.
    assert 1 / found.scale.item() == pytest.approx(steps_per_unit, rel=2e-7)
    assert found.zero_point.item() == zero_point


@pytest.mark.parametrize(
    ("mode", "low", "high", "steps_per_unit", "zero_points"),
    [
        ("sym", [-4.0, -10.0], [4.0, 10.0], [31.875, 12.75], [0, 0]),
        ("sym_restr", [-4.0, -10.0], [4.0, 10.0], [31.75, 12.7], [0, 0]),
        ("asym_u", [-10.0, -10.0], [-2.0, 5.0], [25.5, 17], [255, 170]),
        ("sym", [0.0, -1.0], [0.0, 0.0], [1, 127.5], [0, 0]),
    ],
)
def test_each_channel_has_a_grid_of_its_own(mode, low, high, steps_per_unit, zero_points):
    found = qparams_from_range(torch.tensor(low), torch.tensor(high), QuantSpec.from_mode(mode, axis=0))
    assert (1 / found.scale).tolist() == pytest.approx(steps_per_unit, rel=2e-7)
    assert found.zero_point.tolist() == zero_points


def test_full_symmetric_range_saturates_the_positive_end_by_half_a_step():
    qparams = grid(-127.5, 127.5, QuantSpec())
    assert quantize(torch.tensor([-127.5, 127.5, 127.0]), qparams).tolist() == [-128, 127, 127]


def test_ties_round_to_even():
    qparams = grid(0.0, 255.0, QuantSpec.from_mode("asym_u"))
    assert quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), qparams).tolist() == [0, 2, 2, 4]


def test_integer_ranges_are_taken_as_floats():
    found = qparams_from_range(torch.tensor(-4), torch.tensor(4), QuantSpec())
    assert 1 / found.scale.item() == pytest.approx(31.875)


def test_range_in_the_wrong_order_is_refused_before_zero_widens_it():
    with pytest.raises(ValueError, match=r"^x_min must not be greater than x_max, found 5 and 4$"):
        grid(5.0, 4.0, QuantSpec.from_mode("asym_u"))


def test_wrong_order_names_the_worst_channel():
    with pytest.raises(ValueError, match="found 3 and -2"):
        qparams_from_range(torch.tensor([1.0, 3.0]), torch.tensor([0.5, -2.0]), QuantSpec(axis=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_range_that_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match=f"x_min and x_max must be finite.*found -1 and {bad:g}"):
        grid(-1.0, bad, QuantSpec())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extent", [1e-45, 1e-40, 1e-37, 1e-34])
def test_range_too_narrow_for_float32_quantizes_to_zero_rather_than_nan(mode, extent):
    qparams = grid(-extent, extent, QuantSpec.from_mode(mode, 16))
    x_hat = fake_quantize(torch.tensor([-extent, 0.0, extent]), qparams)
    assert x_hat.abs().max() <= extent


# Another implementation


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda c: f"{c['mode']}-{c['num_bits']}-axis-{c['axis']}")
def test_grid_and_integers_equal_those_of_torch(case):
    spec = QuantSpec.from_mode(case["mode"], case["num_bits"], case["axis"])
    x = torch.tensor(case["x"])
    low, high = (x.min(), x.max()) if spec.axis is None else (x.amin(1), x.amax(1))
    qparams = qparams_from_range(0.9 * low, 0.9 * high, spec)
    assert qparams.scale.reshape(-1).tolist() == pytest.approx(case["scale"], rel=1e-6)  # float32 noise
    assert qparams.zero_point.reshape(-1).tolist() == case["zero_point"]
    assert quantize(x, qparams).tolist() == case["x_q"]


def away_from_ties(spec: QuantSpec, qparams: QParams, fractions: list[float]) -> Tensor:
    """Values over the grid and beyond both of its ends, less than 0.45 steps from an integer."""
    steps = torch.linspace(spec.quant_min - 3, spec.quant_max + 3, len(fractions)).round()
    return (steps - qparams.zero_point + torch.tensor(fractions)) * qparams.scale


@given(specs, ranges, st.lists(st.floats(-0.45, 0.45), min_size=2, max_size=30))
def test_integers_equal_torch_fake_quantize(spec, limits, fractions):
    qparams = grid(*limits, spec)
    x = away_from_ties(spec, qparams, fractions)
    scale, zero_point = qparams.scale.item(), int(qparams.zero_point)
    x_hat = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.quant_min, spec.quant_max)
    assert torch.equal(quantize_centered(x, qparams), torch.round(x_hat / qparams.scale))
    # One product each, of which torch may round a factor differently.
    torch.testing.assert_close(fake_quantize(x, qparams), x_hat, rtol=2e-7, atol=0)


@given(st.sampled_from(MODES), st.integers(2, 16), st.integers(0, 3), st.integers(0, 2**31))
def test_integers_equal_torch_fake_quantize_per_channel(mode, num_bits, axis, seed):
    spec = QuantSpec.from_mode(mode, num_bits, axis)
    x = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(seed))
    rows = x.movedim(axis, 0).flatten(1)
    qparams = qparams_from_range(0.8 * rows.amin(1), 0.8 * rows.amax(1), spec)
    x_hat = torch.fake_quantize_per_channel_affine(
        x, qparams.scale, qparams.zero_point.int(), axis, spec.quant_min, spec.quant_max
    )
    ours = fake_quantize(x, qparams)
    # At a tie, torch's x * (1 / scale) may fall on the other side: such elements are a step apart.
    shape = [-1 if d == axis else 1 for d in range(4)]
    ties = ((x / qparams.scale.reshape(shape)).frac().abs() - 0.5).abs() < 1e-2
    torch.testing.assert_close(ours[~ties], x_hat[~ties], rtol=2e-7, atol=0)
    assert (~ties).float().mean() > 0.8


# Properties


@given(specs, ranges, shares)
def test_error_inside_the_range_is_half_a_step_or_one_when_the_zero_point_is_rounded(spec, limits, shares):
    qparams, x = grid(*limits, spec), inside(*limits, shares)
    steps = ((fake_quantize(x, qparams) - x) / qparams.scale).abs()
    # float32 holds x / scale, up to 2^16, to within 2^-8.
    assert steps.max() <= (0.5 if spec.symmetric else 1.0) + 2 ** (spec.num_bits - 23)


@given(specs, ranges)
def test_zero_is_exact(spec, limits):
    assert fake_quantize(torch.tensor(0.0), grid(*limits, spec)).item() == 0.0


@given(specs, ranges, st.lists(values, min_size=1, max_size=20))
def test_quantizing_twice_changes_nothing(spec, limits, numbers):
    qparams = grid(*limits, spec)
    once = fake_quantize(torch.tensor(numbers), qparams)
    assert torch.equal(fake_quantize(once, qparams), once)


@given(specs, ranges, st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_integers_stay_inside_the_grid(spec, limits, numbers):
    qparams = grid(*limits, spec)
    x_q = quantize(torch.tensor(numbers), qparams)
    assert torch.equal(x_q, x_q.round())
    assert spec.quant_min <= x_q.min() and x_q.max() <= spec.quant_max


@given(specs, ranges, st.lists(values, min_size=1, max_size=20))
def test_larger_values_never_get_smaller_integers(spec, limits, numbers):
    x_q = quantize(torch.tensor(sorted(numbers)), grid(*limits, spec))
    assert (x_q.diff() >= 0).all()


@given(specs, ranges, st.lists(values, min_size=1, max_size=20))
def test_dequantizing_the_integers_is_fake_quantizing(spec, limits, numbers):
    qparams, x = grid(*limits, spec), torch.tensor(numbers)
    assert torch.equal(dequantize(quantize(x, qparams), qparams), fake_quantize(x, qparams))


@given(st.sampled_from(MODES), st.integers(2, 16), st.lists(ranges, min_size=1, max_size=4), st.data())
def test_per_channel_equals_per_tensor_on_each_channel(mode, num_bits, limits, data):
    row = st.lists(values, min_size=3, max_size=3)
    x = torch.tensor([data.draw(row) for _ in limits])
    low, high = torch.tensor(limits).unbind(1)
    together = qparams_from_range(low, high, QuantSpec.from_mode(mode, num_bits, axis=0))
    alone = [grid(*pair, QuantSpec.from_mode(mode, num_bits)) for pair in limits]
    expected = torch.stack([fake_quantize(*pair) for pair in zip(x, alone, strict=True)])
    assert torch.equal(fake_quantize(x, together), expected)


def test_the_given_tensor_is_left_alone():
    x = torch.tensor([0.3, -7.0])
    fake_quantize(x, grid(-1.0, 1.0, QuantSpec()))
    assert x.tolist() == torch.tensor([0.3, -7.0]).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_follow_the_input(dtype):
    x_hat = fake_quantize(torch.ones(2, 3, dtype=dtype), grid(-1.0, 1.0, QuantSpec()))
    assert (x_hat.dtype, x_hat.shape) == (dtype, (2, 3))


def test_nan_stays_nan():
    assert fake_quantize(torch.tensor([float("nan")]), grid(-1.0, 1.0, QuantSpec())).isnan().all()


# Scales as an integer and a shift


def test_approximate_multiplier_is_that_of_the_worked_example():
    # 153 / 2^9: shift = floor(log2(255 / 0.3)) = 9, floor(0.3 * 2^9) = 153
    assert approximate_multiplier(torch.tensor(0.3), 8).item() == 153 / 512


@given(st.floats(2**-20, 2**20, width=32), st.integers(2, 32))
def test_approximate_multiplier_is_below_and_near_and_has_few_bits(multiplier, num_bits):
    found = approximate_multiplier(torch.tensor(multiplier), num_bits).item()
    assert 0 <= multiplier - found < multiplier * 2.0 ** (1 - num_bits)
    numerator = found.as_integer_ratio()[0]
    assert (numerator // (numerator & -numerator)).bit_length() <= num_bits


def test_multiplier_of_one_bit_is_refused():
    with pytest.raises(ValueError, match="num_bits of a multiplier must be at least 2, found 1"):
        approximate_multiplier(torch.tensor(0.7), 1)


def test_zero_point_is_that_of_the_exact_scale():
    spec = QuantSpec.from_mode("asym_u")
    found = qparams_from_range(torch.tensor(-2.0), torch.tensor(10.0), spec, scale_approx_bits=2)
    assert (1 / found.scale.item(), found.zero_point.item()) == (pytest.approx(16.0), 42)


def test_d10_an_unsigned_symmetric_grid_spans_zero_to_v_with_all_its_steps():
    spec = QuantSpec(num_bits=4).unsigned()
    q = qparams_from_range(torch.tensor([-7.0, 0.0]), torch.tensor([3.0, 0.0]), spec)
    assert q.scale.tolist() == pytest.approx([3 / 15, 1.0])
    assert q.zero_point.tolist() == [0, 0]
    scalar = qparams_from_range(torch.tensor(0.0), torch.tensor(3.0), spec)
    assert quantize(torch.tensor([-1.0, 0.0, 0.29, 0.31, 2.0, 9.0]), scalar).tolist() == [0, 0, 1, 2, 10, 15]
