"""Bounds hold as often as they say: checked by summing over all outcomes, or over seeded draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, multinomial

from qtool.numerics.intervals import betting_interval, clopper_pearson, log_capital, paired_interval

TERNARY = (-1, 0, 1)


def ternary(losses: int, gains: int, pairs: int) -> np.ndarray:
    return np.array([gains, pairs - losses - gains, losses])


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 40), (530, 537)])
def test_clopper_pearson_is_that_of_scipy(successes, trials):
    low, high = clopper_pearson(successes, trials, 0.05)
    exact = binomtest(successes, trials).proportion_ci(confidence_level=0.9, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize("pairs", [1, 8, 25])
def test_paired_bound_misses_at_most_at_the_error_rate_in_every_truth(pairs):
    outcomes = [(a, b) for a in range(pairs + 1) for b in range(pairs + 1 - a)]
    highs = np.array([paired_interval(*outcome, pairs, 0.05)[1] for outcome in outcomes])
    counts = [(a, b, pairs - a - b) for a, b in outcomes]
    worst = 0.0
    for losses in np.linspace(0, 1, 41):
        for gains in np.linspace(0, 1 - losses, 9):
            missed = highs < losses - gains - 1e-9
            chances = multinomial.pmf(counts, pairs, [losses, gains, max(0.0, 1 - losses - gains)])
            worst = max(worst, float(chances[missed].sum()))
    assert worst <= 0.05


def test_paired_bound_is_nearly_the_normal_one_on_many_pairs():
    low, high = paired_interval(1200, 800, 100_000, 0.05)
    standard_error = np.sqrt(2000 - 400**2 / 100_000) / 100_000
    assert (high - 0.004) / standard_error == pytest.approx(1.645, rel=0.1)
    assert (0.004 - low) / standard_error == pytest.approx(1.645, rel=0.1)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2000))
def test_paired_bounds_enclose_the_measured_drop_and_mirror(losses, gains, others):
    pairs = losses + gains + others + 1
    low, high = paired_interval(losses, gains, pairs, 0.05)
    assert -1 <= low <= (losses - gains) / pairs <= high <= 1
    assert paired_interval(gains, losses, pairs, 0.05) == (-high, -low)


def test_more_confidence_is_wider():
    assert paired_interval(9, 4, 1000, 0.01)[1] > paired_interval(9, 4, 1000, 0.05)[1]
    assert betting_interval(TERNARY, ternary(9, 4, 1000), 0.01)[1] > 0.0192


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2000), st.floats(-0.3, 0.3))
def test_a_mean_is_outside_the_betting_interval_if_a_bettor_got_rich(losses, gains, others, mean):
    counts = ternary(losses, gains, losses + gains + others)
    low, high = betting_interval(TERNARY, counts, 0.05)
    above = log_capital(TERNARY, counts, mean, below=True) >= np.log(20)
    below = log_capital(TERNARY, counts, mean, below=False) >= np.log(20)
    assert above == (high <= mean)
    assert below == (low >= mean)


@given(st.integers(0, 30), st.integers(0, 30), st.floats(0.05, 0.95), st.booleans())
def test_capital_is_a_fair_game_where_the_mean_is_right(losses, others, mean, below):
    def capital(ones: int, zeros: int) -> float:
        return float(np.exp(log_capital((0, 1), np.array([zeros, ones]), mean, below=below)))

    expected = mean * capital(losses + 1, others) + (1 - mean) * capital(losses, others + 1)
    assert expected == pytest.approx(capital(losses, others))


def test_no_image_tells_nothing():
    assert betting_interval(TERNARY, np.zeros(3, dtype=int), 0.05) == (-1, 1)


def test_only_one_outcome_leaves_its_side_open():
    assert betting_interval((0, 1), np.array([0, 50]), 0.05)[1] == 1
    assert 0.8 < betting_interval((0, 1), np.array([0, 50]), 0.05)[0] < 1


def test_a_sure_loss_is_found_soon():
    images = next(n for n in range(1, 2000) if betting_interval((0, 1), np.array([n, 0]), 0.05)[1] <= 0.01)
    assert images < 2 * next(n for n in range(1, 2000) if binom.pmf(0, n, 0.01) <= 0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda: clopper_pearson(3, 2, 0.05),
        lambda: clopper_pearson(0, 0, 0.05),
        lambda: paired_interval(-1, 0, 5, 0.05),
        lambda: paired_interval(3, 3, 5, 0.05),
        lambda: log_capital((0, 1), np.array([1, 1]), 1.0, below=True),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
