"""Which integers of a grid are used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.affine import quantize_centered
from qtool.numerics.codes import CodeCounts
from qtool.numerics.spec import QParams, QuantSpec


def grid(bits: int = 4, scale: float = 1.0, zero_point: float = 0.0, mode: str = "sym") -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point), QuantSpec.from_mode(mode, bits))


def test_codes_are_counted_by_hand():
    counts = CodeCounts(grid(), -8.0, 7.0)
    x = torch.tensor([-3.0, 0.0, 2.2, 9.0])  # 9 is beyond the largest integer, 7
    counts.add(x, quantize_centered(x, grid()))
    use = counts.use()
    assert use.saturated == 0.25 and use.levels == 16 and use.dead == 0
    assert use.unused == 16 - 4  # -3, 0, 2 and 7 were
    assert use.used_range == 11 / 16


def test_behind_a_relu_the_negative_codes_are_dead_and_negative_values_beyond():
    counts = CodeCounts(grid(), 0.0, 7.0)
    x = torch.tensor([0.0, 7.0])
    counts.add(x, quantize_centered(x, grid()))
    use = counts.use()
    assert (use.dead, use.unused, use.used_range, use.saturated) == (8, 6, 1.0, 0.0)


def test_a_value_that_rounds_to_the_last_code_is_not_saturated():
    counts = CodeCounts(grid(), -8.0, 7.0)
    x = torch.tensor([7.4, 7.6, -8.4, -8.6])
    counts.add(x, quantize_centered(x, grid()))
    assert counts.use().saturated == 0.5


@given(st.integers(2, 8), st.floats(0.01, 1), st.integers(0, 3))
def test_batches_add_up_to_the_whole(bits, scale, zero_point):
    g = grid(bits, scale, float(zero_point), "asym_u")
    x = torch.linspace(-2, 2, 60)
    low, high = -float(zero_point), g.spec.quant_max - float(zero_point)
    whole, parts = CodeCounts(g, low, high), CodeCounts(g, low, high)
    whole.add(x, quantize_centered(x, g))
    for part in x.split(7):
        parts.add(part, quantize_centered(part, g))
    assert whole.use() == parts.use()


def test_nothing_cannot_be_said_of_no_values():
    with pytest.raises(ValueError, match="no values"):
        CodeCounts(grid(), -8.0, 7.0).use()
