"""The numbers that compare outputs, by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.metrics import cosine_similarity, mse, paired_standard_error, sqnr_db, top_k_correct
from qtool.numerics.spec import QuantSpec

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("x", "x_hat", "expected"),
    [
        ([3.0, 4.0], [3.0, 3.5], 20.0),  # 25 / 0.25
        ([1.0, 1.0], [0.0, 2.0], 0.0),
        ([1.0], [1.0], INF),
        ([0.0], [0.0], INF),
        ([0.0], [1.0], -INF),
        ([1.0], [INF], -INF),
    ],
)
def test_sqnr_is_ten_log10_of_signal_over_noise(x, x_hat, expected):
    assert sqnr_db(torch.tensor(x), torch.tensor(x_hat)) == pytest.approx(expected)


def test_sqnr_of_nan_is_nan():
    assert math.isnan(sqnr_db(torch.tensor([1.0]), torch.tensor([NAN])))


def test_each_bit_is_worth_six_db():
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for bits in range(4, 11):
        qparams = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), QuantSpec(num_bits=bits))
        found.append(sqnr_db(x, fake_quantize(x, qparams)))
    gains = torch.tensor(found).diff()
    assert ((gains > 5.5) & (gains < 6.5)).all()


def test_mse_accumulates_in_float64():
    # In float32, adding 1 to 2^24 changes nothing.
    x = torch.ones(2**12)
    x[0] = 2.0**12
    assert mse(x, torch.zeros_like(x)) == (2.0**24 + 2**12 - 1) / 2**12


@pytest.mark.parametrize(
    ("x", "x_hat", "expected"),
    [
        ([1.0, 0.0], [0.0, 2.0], 0.0),
        ([1.0, 2.0], [2.0, 4.0], 1.0),
        ([1.0, 2.0], [-1.0, -2.0], -1.0),
        ([3.0, 4.0], [4.0, 3.0], 0.96),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
    ],
)
def test_cosine_is_that_of_the_angle(x, x_hat, expected):
    assert cosine_similarity(torch.tensor(x), torch.tensor(x_hat)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "label", "k", "correct"),
    [
        ([1.0, 3.0, 2.0], 1, 1, True),
        ([1.0, 3.0, 2.0], 2, 1, False),
        ([1.0, 3.0, 2.0], 2, 2, True),
        ([1.0, 3.0, 2.0], 0, 9, True),  # k above the number of classes
        ([5.0, 5.0, 5.0], 0, 1, True),  # ties count in favour of the lower index
        ([5.0, 5.0, 5.0], 1, 1, False),
        ([5.0, 5.0, 5.0], 1, 2, True),
        ([5.0, 5.0, 5.0], 2, 2, False),
        ([NAN, NAN, NAN], 0, 3, False),
        ([1.0, NAN, 0.0], 0, 1, False),
        ([1.0, NAN, 0.0], 1, 5, False),
        ([INF, 1.0, 0.0], 0, 1, False),
    ],
)
def test_label_counts_when_among_the_k_largest(logits, label, k, correct):
    assert top_k_correct(torch.tensor([logits]), torch.tensor([label]), k).tolist() == [correct]


@given(st.lists(st.permutations(range(7)), min_size=1, max_size=5), st.integers(1, 7))
def test_top_k_agrees_with_topk_of_torch(rows, k):
    logits, labels = torch.tensor(rows).float(), torch.arange(len(rows))
    expected = (logits.topk(k).indices == labels.unsqueeze(1)).any(dim=1)
    assert torch.equal(top_k_correct(logits, labels, k), expected)


def test_paired_standard_error_is_that_of_the_differences():
    # Differences 0, 1, 0, -1: variance 2 / 3 about their mean 0, over 4 samples.
    first, second = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])
    assert paired_standard_error(first, second) == pytest.approx(math.sqrt(2 / 3 / 4))


def test_paired_standard_error_of_a_single_sample_is_zero():
    assert paired_standard_error(torch.tensor([True]), torch.tensor([False])) == 0.0
