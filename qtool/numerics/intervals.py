"""Confidence bounds on the mean of per-image outcomes, for one look at the data or for many.

Every bound is one-sided: the mean lies above `high` with probability at most error_rate, and below
`low` with probability at most error_rate. Images are independent draws from one population.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import beta, binom

Interval = tuple[float, float]

# Shares of the largest bet that cannot be ruined, spaced so that one of them is near the best bet
# for any mean and variance; the largest wins soonest where nothing is ever lost.
BETS = 0.98 * 2.0 ** (-np.arange(20) / 2)

# Of the error rate, what the paired interval spends on how many images changed at all.
SPENT_ON_CHANGED = 0.1
# Probability left out at each end of a sum over a binomial distribution, and added to the result.
TRUNCATED = 1e-12
# Relative to the range of values: how near to its ends a bound is looked for.
EDGE = 1e-9


def clopper_pearson(successes: int, trials: int, error_rate: float) -> Interval:
    """Exact bounds on the share of successes.

    Args:
        successes: 0 to trials.
        trials: at least 1.
        error_rate: of each of the two bounds, between 0 and 1.

    Reference:
        Clopper and Pearson 1934, Biometrika 26(4), by quantiles of the beta distribution.

    Example:
        >>> low, high = clopper_pearson(0, 59, 0.05)  # 59 without a failure show "below 5 %"
        >>> low, round(high, 4)
        (0.0, 0.0495)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"successes {successes} must be 0 to trials, trials {trials} at least 1")
    low = 0.0 if successes == 0 else float(beta.ppf(error_rate, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.isf(error_rate, successes + 1, trials - successes))
    return low, high


def paired_interval(losses: int, gains: int, pairs: int, error_rate: float) -> Interval:
    """Bounds on P(loss) - P(gain), from pairs of which each is a loss, a gain, or neither.

    The upper bound is the largest drop at which so few losses less gains would not be surprising,
    whatever share of pairs changes at all, in a confidence set for that share (which costs a tenth of the
    error rate). Up to one half, the probability of so few grows with that share: the sum over the
    pairs is one of independent Bernoulli variables, whose mode is within 1 of the mean. So only the
    largest share has to be tried. Above one half, the exact bounds on both shares are subtracted.

    Args:
        losses, gains: how many, 0 or more, together at most pairs.
        pairs: at least 1.
        error_rate: of each of the two bounds, between 0 and 1.

    Reference:
        Berger and Boos 1994, JASA 89(427), for the confidence set of the nuisance parameter;
        Darroch 1964, Ann. Math. Statist. 35(3), theorem 4, for the mode.

    Example:
        >>> low, high = paired_interval(losses=9, gains=4, pairs=1000, error_rate=0.05)
        >>> round(low, 4), round(high, 4)
        (-0.004, 0.0138)
    """
    if min(losses, gains) < 0 or losses + gains > pairs or pairs < 1:
        raise ValueError(f"losses {losses} and gains {gains} must be 0 or more, at most {pairs} together")
    return (
        -_largest_drop(gains, losses, pairs, error_rate),
        _largest_drop(losses, gains, pairs, error_rate),
    )


def _largest_drop(losses: int, gains: int, pairs: int, error_rate: float) -> float:
    spent = SPENT_ON_CHANGED * error_rate
    changed = clopper_pearson(losses + gains, pairs, spent)[1]
    if changed > 0.5:
        most_losses = clopper_pearson(losses, pairs, error_rate / 2)[1]
        return most_losses - clopper_pearson(gains, pairs, error_rate / 2)[0]

    def surprise(drop: float) -> float:
        return _at_most(losses - gains, pairs, changed, drop) - (error_rate - spent)

    # From this drop on, the probability grows with the share of pairs that change.
    smallest = max((losses - gains + 2) / (pairs - 1), -changed)
    if smallest >= changed or surprise(changed) > 0:
        return changed
    return smallest if surprise(smallest) <= 0 else float(brentq(surprise, smallest, changed))


def _at_most(total: int, pairs: int, changed: float, drop: float) -> float:
    """P(losses - gains <= total), where a pair changes with probability changed."""
    start, end = (float(binom.ppf(share, pairs, changed)) for share in (TRUNCATED, 1 - TRUNCATED))
    counts = np.arange(start, end + 1)  # how many pairs change
    share_of_losses = min(1.0, (changed + drop) / (2 * changed))
    at_most = binom.cdf(np.floor((counts + total) / 2), counts, share_of_losses)
    return float(binom.pmf(counts, pairs, changed) @ at_most) + 2 * TRUNCATED


def log_capital(
    values: Sequence[float], counts: NDArray[np.integer], mean: float, *, below: bool
) -> NDArray[np.float64]:
    """Log of what a bettor owns who started with 1 and bet that the mean is below (or above) a number.

    If it is not, the capital is a nonnegative supermartingale, so it ever reaches 1 / error_rate with
    probability at most error_rate, however often one looks. The bets are constant shares, and the
    start capital is divided evenly among them; so the order of the images does not matter.

    Args:
        values: the outcomes that an image can have, ascending, (K,).
        counts: how many images had each, (..., K).
        mean: the number bet against, between the first and the last value, both excluded.
        below: whether the bets are on a mean below it; else above.

    Returns:
        shape (...).

    Reference:
        Waudby-Smith and Ramdas 2024, JRSS-B 86(1), arXiv:2010.09686, section 4 (betting); Ville's
        inequality; Ryu and Bhatt 2022, arXiv:2207.12382, for mixing over constant bets.
    """
    if not values[0] < mean < values[-1]:
        raise ValueError(f"mean {mean} must be between {values[0]} and {values[-1]}")
    distance = np.asarray(values) - mean if not below else mean - np.asarray(values)
    gain_per_bet = distance / -distance.min()  # -1 is all that was bet
    growth = np.log1p(np.outer(gain_per_bet, BETS))  # (K, bets)
    return np.asarray(logsumexp(counts @ growth, axis=-1) - math.log(len(BETS)))


def betting_interval(values: Sequence[float], counts: NDArray[np.integer], error_rate: float) -> Interval:
    """Bounds on a mean that hold at all looks together, after every image if one likes.

    Args:
        values: the outcomes that an image can have, ascending, (K,).
        counts: how many images had each, (K,).
        error_rate: of each of the two bounds, over all looks, between 0 and 1.

    Reference:
        As log_capital: the means that no bettor has got rich against.

    Example:
        >>> low, high = betting_interval((-1, 0, 1), np.array([4, 987, 9]), 0.05)
        >>> round(low, 4), round(high, 4)
        (-0.0077, 0.0192)
    """
    images = int(counts.sum())
    if images == 0:
        return float(values[0]), float(values[-1])
    rich = -math.log(error_rate)
    margin = EDGE * (values[-1] - values[0])
    first, last = values[0] + margin, values[-1] - margin
    average = min(max(float(counts @ np.asarray(values)) / images, first), last)

    def poor_by(mean: float, below: bool) -> float:
        return float(log_capital(values, counts, mean, below=below)) - rich

    # A bettor against the average itself never wins, one against the end of the range usually does.
    low, high = float(values[0]), float(values[-1])
    if average > first and poor_by(first, False) > 0:
        low = float(brentq(poor_by, first, average, args=(False,)))
    if average < last and poor_by(last, True) > 0:
        high = float(brentq(poor_by, average, last, args=(True,)))
    return low, high
