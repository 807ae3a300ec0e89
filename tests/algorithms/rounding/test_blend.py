"""Between the float network's outputs and those of the float weight: as much as holds on other rows."""

from dataclasses import replace

import pytest
import torch

from qtool.algorithms.rounding.blend import blended
from qtool.algorithms.rounding.quadratic import Sums

ROWS, INPUTS, OUTPUTS = 400, 60, 5


def _rows(noise, systematic, seed=0):
    """Rows that are read, and outputs wanted for them: of inputs without noise, of a weight that differs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, ROWS, INPUTS, generator=generator)
    weight = torch.randn(1, OUTPUTS, INPUTS, generator=generator)
    lacking = systematic * torch.randn(1, OUTPUTS, INPUTS, generator=generator)
    read = x + noise * torch.randn(1, ROWS, INPUTS, generator=generator)
    return read, x @ weight.mT + read @ lacking.mT + 3, weight.double(), (weight + lacking).double()


def _forms(x, y, centered=True):
    halves = [Sums(1, OUTPUTS, INPUTS) for _ in range(2)]
    for half, part in zip(halves, (slice(ROWS // 2), slice(ROWS // 2, ROWS)), strict=True):
        half.add(x[:, part], y[:, part])
    whole = (halves[0] + halves[1]).quadratic(centered)
    return replace(whole, halves=tuple(half.quadratic(centered) for half in halves))


def test_the_sums_of_two_halves_are_those_of_all_rows():
    x, y, _, _ = _rows(0.1, 0.1)
    whole = _forms(x, y)
    sums = Sums(1, OUTPUTS, INPUTS)
    sums.add(x, y)
    for name, value in vars(sums.quadratic(True)).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(whole, name), value, rtol=1e-5, atol=1e-3)


def test_errors_that_follow_from_the_inputs_are_made_up_for():
    x, y, weight, best = _rows(noise=0.0, systematic=0.3)
    whole = _forms(x, y)
    found = blended(whole, weight)
    # Damping bends the change a little.
    assert float((found.wanted - best).norm() / (best - weight).norm()) < 0.3


def test_noise_is_not_fitted():
    """The rows ask for a change that is noise; what is taken of it costs less on rows that were not seen."""
    x, y, weight, _ = _rows(noise=0.2, systematic=0.0)
    whole = _forms(x, y)
    fitted = torch.linalg.solve(whole.hessian, whole.linear.mT).mT
    found = blended(whole, weight)
    unseen = _unseen(weight, 0.2)
    assert whole.losses(fitted).sum() < whole.losses(weight).sum()
    assert unseen.losses(found.wanted).sum() <= 1.01 * min(
        unseen.losses(w).sum() for w in (weight, fitted, 0.5 * (weight + fitted))
    )
    assert unseen.losses(fitted).sum() > 1.05 * unseen.losses(found.wanted).sum()


def _unseen(weight, noise):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(1, 20000, INPUTS, generator=generator)
    sums = Sums(1, OUTPUTS, INPUTS)
    sums.add(x + noise * torch.randn(1, 20000, INPUTS, generator=generator), x @ weight.float().mT)
    return sums.quadratic(True)


def test_the_form_is_that_of_the_outputs_of_the_weight_that_is_wanted():
    x, y, weight, _ = _rows(0.3, 0.3)
    whole = _forms(x, y)
    found = blended(whole, weight)
    torch.testing.assert_close(
        found.losses(found.wanted), torch.zeros(1, OUTPUTS).double(), atol=1e-6, rtol=0
    )
    values = weight + 0.1
    errors = x.double() @ (values - found.wanted).mT
    torch.testing.assert_close(found.losses(values), errors.var(dim=1, unbiased=False), rtol=1e-3, atol=1e-6)
    # The means are those of the outputs that were wanted at first.
    torch.testing.assert_close(found.best_bias(values), (y - x @ values.float().mT).mean(1).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_numbers_are_left_to_the_caller(value):
    x, y, weight, _ = _rows(0.1, 0.1)
    x[0, 3, 2] = value
    whole = _forms(x, y)
    assert blended(whole, weight) is whole


def test_halves_are_for_the_outputs_that_are_wanted():
    x, y, weight, _ = _rows(0.3, 0.3)
    whole = _forms(x, y)
    assert whole.split() is whole.halves
    found = blended(whole, weight)
    values = weight + 0.1
    parts = [half.losses(values) for half in found.split()]
    torch.testing.assert_close(sum(parts) / 2, found.losses(values), rtol=0.1, atol=0)
    assert all(bool((half.losses(found.wanted) < 1e-6).all()) for half in found.split())


def test_inputs_that_are_always_zero_leave_the_weight():
    x, y, weight, _ = _rows(0.0, 0.0)
    whole = _forms(torch.zeros_like(x), torch.zeros_like(y))
    assert torch.equal(blended(whole, weight).wanted, weight)
