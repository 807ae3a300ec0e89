"""Ranges from statistics are those of the worked examples, and what a mode lacks is named."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qtool.numerics.affine import dequantize, qparams_from_range, quantize
from qtool.numerics.clipping import FIELDS, aciq_alpha, choose_range, range_of_tensor
from qtool.numerics.histogram import Histogram
from qtool.numerics.spec import (
    CLIP_MODES,
    HISTOGRAM_MODES,
    IMAGE_MODES,
    LIVE_CLIP_MODES,
    MOMENT_MODES,
    ClipSpec,
    QuantSpec,
)
from qtool.observers.stats import ActivationStats

GOLDEN = Path(__file__).parents[1] / "golden"
EXAMPLES = yaml.safe_load((GOLDEN / "clipping.yaml").read_text(encoding="utf-8"))
SOLVED = json.loads((GOLDEN / "aciq.json").read_text(encoding="utf-8"))
COLUMNS = ("mode", "n_stds", "half_range", "grid", "num_bits", "low", "high")

RECORD = ActivationStats(**EXAMPLES["record"])
UNSIGNED = QuantSpec.from_mode("asym_u")
ESTIMATORS = (*HISTOGRAM_MODES, *IMAGE_MODES)


@dataclass(frozen=True)
class Measured:
    """All that a range can be chosen from, of a batch of images."""

    min: float
    max: float
    avg_min: float | None = None
    avg_max: float | None = None
    mean: float | None = None
    std: float | None = None
    b: float | None = None
    histogram: Histogram | None = None
    image_min: np.ndarray | None = None
    image_max: np.ndarray | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> "Measured":
        """x: (images, elements); the histogram is of the first half of each, as one of a sample is."""
        return cls(
            min=float(x.min()),
            max=float(x.max()),
            avg_min=float(x.amin(1).mean()),
            avg_max=float(x.amax(1).mean()),
            mean=float(x.mean()),
            std=float(x.std(correction=0)),
            b=float((x - x.mean()).abs().mean()),
            histogram=Histogram.of(x[:, : x.shape[1] // 2]),
            image_min=x.amin(1).numpy(),
            image_max=x.amax(1).numpy(),
        )


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Twenty images, one of them with a far value that the histogram misses."""
    x = torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    x[3, -1] = 40
    return x


def widest(low: float, high: float, spec: QuantSpec) -> tuple[float, float]:
    """The range a grid is laid over: symmetric grids look only at the larger end."""
    v = max(abs(low), abs(high))
    return (-v, v) if spec.symmetric else (low, high)


@pytest.mark.parametrize(COLUMNS, EXAMPLES["from_record"])
def test_range_of_a_record_is_that_of_the_worked_example(mode, n_stds, half_range, grid, num_bits, low, high):
    spec = QuantSpec.from_mode(grid, num_bits)
    found = choose_range(RECORD, spec, ClipSpec(mode, n_stds, half_range))
    assert [x.item() for x in found] == pytest.approx([low, high], rel=1e-6)  # float32


@pytest.mark.parametrize(COLUMNS, EXAMPLES["from_tensor"])
def test_range_of_a_tensor_is_that_of_the_worked_example(mode, n_stds, half_range, grid, num_bits, low, high):
    x, spec = torch.tensor(EXAMPLES["tensor"]).float(), QuantSpec.from_mode(grid, num_bits)
    found = range_of_tensor(x, spec, ClipSpec(mode, n_stds, half_range))
    assert [v.item() for v in found] == pytest.approx([low, high], rel=1e-6)  # float32


def test_symmetric_average_takes_the_larger_mean_not_the_mean_of_the_larger():
    # Rows reach 3 and 3 in magnitude; their ends average to -2 and 2.
    x = torch.tensor([[-3.0, 1.0], [-1.0, 3.0]])
    low, high = range_of_tensor(x, QuantSpec(), ClipSpec("avg"))
    assert (low.item(), high.item()) == (-2.0, 2.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_range_keeps_its_axis(axis):
    low, high = range_of_tensor(torch.tensor([[-1.0, 3.0], [-3.0, 5.0]]), QuantSpec(axis=axis))
    expected = {0: ([-1, -3], [3, 5]), 1: ([-3, 3], [-1, 5])}[axis]
    assert (low.tolist(), high.tolist()) == expected


def test_scalar_has_a_range():
    assert [v.item() for v in range_of_tensor(torch.tensor(-2.0), QuantSpec(), ClipSpec("avg"))] == [-2, -2]


def test_channels_last_tensors_have_the_same_range():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    for clip in (ClipSpec("avg"), ClipSpec("gauss"), None):
        assert range_of_tensor(x, QuantSpec(), clip) == range_of_tensor(last, QuantSpec(), clip)


# Distiller's defect D18: after a net-aware edit, mean + n std can lie below the raised minimum.


def test_range_is_ordered_when_mean_and_std_lie_below_an_edited_minimum():
    record = ActivationStats(min=-5, max=1, mean=-3, std=0.5).clamped(0, float("inf"))
    low, high = choose_range(record, UNSIGNED, ClipSpec("n_std", n_stds=2))
    assert (low.item(), high.item()) == (0.0, 0.0)


# ACIQ's constants


ENTRIES = [("laplace", half, bits) for half in (False, True) for bits in range(9)]
ENTRIES += [("gauss", half, bits) for half in (False, True) for bits in range(1, 9)]


@pytest.mark.parametrize(("mode", "half_range", "bits"), ENTRIES)
def test_constants_solve_the_equation_of_aciq(mode, half_range, bits):
    solved = SOLVED[mode][str(bits + half_range)]
    # The published tables cut or round the second decimal; gauss at 9 bits (4.2163) has only one.
    tolerance = 0.02 if (mode, half_range, bits) == ("gauss", True, 8) else 0.0101
    assert aciq_alpha(mode, bits, half_range) == pytest.approx(solved, abs=tolerance)


@pytest.mark.parametrize(
    ("mode", "half_range", "bits", "constant"),
    [
        ("laplace", False, 2, 2.83),
        ("laplace", False, 4, 5.03),
        ("laplace", False, 8, 9.89),
        ("laplace", True, 3, 5.02),  # not 5.03
        ("laplace", True, 8, 11.16),
        ("gauss", False, 4, 2.55),
        ("gauss", True, 8, 4.2),
    ],
)
def test_constants_are_as_published(mode, half_range, bits, constant):
    assert aciq_alpha(mode, bits, half_range) == constant


@pytest.mark.parametrize("mode", ["laplace", "gauss"])
def test_half_range_uses_the_constant_of_one_bit_more(mode):
    for bits in (1, 2, 4, 5, 6, 7):
        assert aciq_alpha(mode, bits, half_range=True) == aciq_alpha(mode, bits + 1)


# Estimators


@pytest.mark.parametrize("mode", ESTIMATORS)
@pytest.mark.parametrize("spec", [QuantSpec(), UNSIGNED, QuantSpec(num_bits=4)], ids=str)
def test_estimators_leave_a_far_value_out_and_stay_inside_the_record(images, mode, spec):
    record = Measured.of(images)
    low, high = (v.item() for v in choose_range(record, spec, ClipSpec(mode)))
    assert record.min <= low < -2 and 2 < high < 6
    assert all(v.dtype == torch.float32 for v in choose_range(record, spec, ClipSpec(mode)))


@pytest.mark.parametrize("mode", ESTIMATORS)
def test_a_narrowed_record_narrows_what_estimators_see(images, mode):
    record = replace(Measured.of(images), min=0.0, max=6.0)
    narrowed = Measured.of(images.clamp(0, 6))
    found = choose_range(record, UNSIGNED, ClipSpec(mode))
    wanted = choose_range(replace(narrowed, max=6.0), UNSIGNED, ClipSpec(mode))
    assert [v.item() for v in found] == pytest.approx([v.item() for v in wanted], abs=record.histogram.width)


@pytest.mark.parametrize("mode", ESTIMATORS)
def test_half_range_sees_the_values_behind_the_relu(images, mode):
    before, behind = Measured.of(images), Measured.of(images.relu())
    found = choose_range(before, QuantSpec(num_bits=4), ClipSpec(mode, half_range=True))
    wanted = choose_range(behind, QuantSpec(num_bits=4), ClipSpec(mode))
    assert [v.item() for v in found] == pytest.approx([v.item() for v in wanted], abs=before.histogram.width)


@pytest.mark.parametrize("mode", ESTIMATORS)
def test_a_record_without_extent_has_a_range(mode):
    record = replace(Measured.of(torch.randn(5, 10) - 8), min=0.0, max=0.0)  # below a ReLU
    assert [v.item() for v in choose_range(record, UNSIGNED, ClipSpec(mode))] == [0, 0]


@pytest.mark.parametrize(
    ("mode", "narrow", "wide"),
    [
        ("percentile", {"percentile": 90.0}, {"percentile": 99.9}),
        ("quantile", {"outlier_prob": 0.1}, {"outlier_prob": 1e-3}),
        ("mean_no_outliers", {"outlier_prob": 0.4}, {"outlier_prob": 1e-4}),
    ],
)
def test_settings_of_a_mode_change_its_range(images, mode, narrow, wide):
    record = Measured.of(images)
    ends = [choose_range(record, UNSIGNED, ClipSpec(mode, **given))[1].item() for given in (narrow, wide)]
    assert ends[0] < ends[1]


@pytest.mark.parametrize("mode", ["percentile", "quantile", "mse"])
@pytest.mark.parametrize("spec", [QuantSpec(num_bits=4), UNSIGNED], ids=str)
def test_a_live_tensor_has_the_range_of_its_histogram(images, mode, spec):
    record = replace(Measured.of(images), histogram=Histogram.of(images))
    assert range_of_tensor(images, spec, ClipSpec(mode)) == choose_range(record, spec, ClipSpec(mode))


@pytest.mark.parametrize("mode", [m for m in CLIP_MODES if m not in LIVE_CLIP_MODES])
def test_modes_that_need_calibration_are_refused_for_a_live_tensor(images, mode):
    with pytest.raises(
        ValueError, match=f"clip mode {mode} is of calibrated tensors; choose one of none, avg"
    ):
        range_of_tensor(images, QuantSpec(), ClipSpec(mode))


@pytest.mark.parametrize("mode", ["mse", "l4", "percentile"])
@pytest.mark.parametrize("axis", [0, 1])
def test_channels_are_clipped_each_by_itself(mode, axis):
    weight = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [10], [0.1]]
    )
    weight[0, 7] = 12
    x = weight.T.contiguous() if axis else weight
    low, high = range_of_tensor(x, QuantSpec(num_bits=4, axis=axis), ClipSpec(mode, percentile=99.0))
    largest = weight.abs().amax(1)
    assert high.shape == (3,) and (high < largest).all() and (high == -low).all()
    assert high[0] < (11 if mode == "l4" else 5) and 10 < high[1] < 40 and 0.1 < high[2] < 0.4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_l4_is_the_best_of_all_ranges_by_fourth_powers(symmetric, size):
    rows = torch.randn(4, 500, generator=torch.Generator().manual_seed(2)).double() ** 3 * size
    spec = QuantSpec(num_bits=4, symmetric=symmetric, axis=0)

    def loss(low, high):
        grid = qparams_from_range(low.float(), high.float(), spec)
        error = dequantize(quantize(rows.float(), grid), grid).double() - rows
        return ((error / size) ** 4).sum(1)

    found = loss(*range_of_tensor(rows.float(), spec, ClipSpec("l4")))
    ends = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    steps = torch.arange(0.05, 1.001, 0.025).tolist()
    others = [(a, b) for a in steps for b in steps] if not symmetric else [(a, a) for a in steps]
    best = torch.stack([loss(ends[0] * a, ends[1] * b) for a, b in others]).amin(0)
    assert (found <= 1.1 * best).all()
    squares = range_of_tensor(rows.float(), spec, ClipSpec("mse"))
    assert (found <= loss(*squares)).all() and (found < loss(*squares)).any()


def test_l4_of_a_whole_weight_is_that_of_one_channel():
    x = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    one = range_of_tensor(x.reshape(1, -1), QuantSpec(num_bits=4, axis=0), ClipSpec("l4"))
    whole = range_of_tensor(x, QuantSpec(num_bits=4), ClipSpec("l4"))
    assert [float(v) for v in whole] == [float(v) for v in one]


def test_l4_of_zeros_is_nothing():
    found = range_of_tensor(torch.zeros(2, 5), QuantSpec(num_bits=4, axis=0), ClipSpec("l4"))
    assert [v.tolist() for v in found] == [[0, 0], [0, 0]]


# What is missing or senseless


@pytest.mark.parametrize(
    ("mode", "field", "name"),
    [(m, "histogram", "a histogram") for m in HISTOGRAM_MODES]
    + [(m, f, f) for m in IMAGE_MODES for f in ("image_min", "image_max")],
)
def test_what_an_estimator_lacks_is_named_with_what_to_do(images, mode, field, name):
    record = replace(Measured.of(images), **{field: None})
    wanted = f"^clip mode {mode} needs {name}; calibrate again, the file has none$"
    with pytest.raises(ValueError, match=wanted):
        choose_range(record, UNSIGNED, ClipSpec(mode))


@pytest.mark.parametrize(
    ("mode", "field"), [(m, f) for m in MOMENT_MODES for f in FIELDS[m] if f not in ("min", "max")]
)
def test_missing_field_is_named_with_the_mode_that_needs_it(mode, field):
    record = replace(RECORD, **{field: None})
    with pytest.raises(ValueError, match=f"^clip mode {mode} needs {field}$"):
        choose_range(record, UNSIGNED, ClipSpec(mode, n_stds=2))


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_fields_that_the_mode_does_not_read_may_be_missing(images, mode):
    record = Measured.of(images)
    absent = {f: None for f in vars(record) if f not in ("min", "max", *FIELDS[mode])}
    clip = ClipSpec(mode, n_stds=2)
    assert choose_range(replace(record, **absent), UNSIGNED, clip) == choose_range(record, UNSIGNED, clip)


@pytest.mark.parametrize("n_stds", [None, 0, -1.5])
def test_n_std_without_a_positive_number_is_refused(n_stds):
    with pytest.raises(ValueError, match=f"clip mode n_std needs a positive n_stds, found {n_stds}"):
        choose_range(RECORD, UNSIGNED, ClipSpec("n_std", n_stds))


@pytest.mark.parametrize("mode", ["gauss", "laplace"])
def test_aciq_above_its_tables_is_refused_with_both_numbers(mode):
    with pytest.raises(ValueError, match=f"clip mode {mode} .* up to 8 bits, found 9 bits"):
        choose_range(RECORD, QuantSpec(num_bits=9), ClipSpec(mode))


def test_clipping_per_channel_is_refused():
    with pytest.raises(ValueError, match="clip mode n_std is per tensor, the grid is per channel"):
        range_of_tensor(torch.ones(2, 2), QuantSpec(axis=0), ClipSpec("n_std", 2))


@pytest.mark.parametrize("axis", [None, 0])
def test_empty_tensor_is_refused(axis):
    with pytest.raises(ValueError, match="range of an empty tensor is not defined"):
        range_of_tensor(torch.ones(3, 0), QuantSpec(axis=axis))


@pytest.mark.parametrize("clip", ["gauss", "laplace"])
@pytest.mark.parametrize(
    ("grid", "free", "kept"),
    [("sym", (-9.89, 9.89), (-5, 5)), ("asym_u", (-2, 17.78), (-2, 5)), ("asym_s", (-2, 17.78), (-2, 5))],
)
def test_d9_aciq_ranges_stay_within_the_observed_values_when_asked(clip, grid, free, kept):
    unit = {"laplace": 1.0, "gauss": 9.89 / 3.92}[clip]  # both modes reach 9.89 from the mean
    record = ActivationStats(min=-3.0, max=5.0, avg_min=-2.0, avg_max=4.0, mean=0.0, std=unit, b=unit)
    spec = QuantSpec.from_mode(grid)
    found = choose_range(record, spec, ClipSpec(clip))
    assert [v.item() for v in found] == pytest.approx(free, rel=1e-6)
    within = choose_range(record, spec, ClipSpec(clip, to_observed=True))
    assert [v.item() for v in within] == pytest.approx(kept, rel=1e-6)


def test_d9_a_range_inside_the_observed_values_stays():
    record = replace(RECORD, min=-1e6, max=1e6)
    for grid in ("sym", "asym_u"):
        spec = QuantSpec.from_mode(grid, 4)
        within = choose_range(record, spec, ClipSpec("laplace", to_observed=True))
        assert within == choose_range(record, spec, ClipSpec("laplace"))


def test_d9_a_record_that_an_edit_made_zero_gives_an_empty_range():
    record = ActivationStats(min=0.0, max=0.0, avg_min=0.0, avg_max=0.0, mean=-3.0, std=1.0, b=1.0)
    for grid in ("sym", "asym_s"):
        found = choose_range(record, QuantSpec.from_mode(grid), ClipSpec("gauss", to_observed=True))
        assert [v.item() for v in found] == [0, 0]


def test_d10_an_unsigned_symmetric_grid_takes_the_constants_of_one_bit_more():
    spec = QuantSpec(num_bits=4).unsigned()
    found = choose_range(RECORD, spec, ClipSpec("laplace"))
    assert [v.item() for v in found] == pytest.approx([0, abs(RECORD.mean) + RECORD.b * 6.2], rel=1e-6)
