"""The quadratic form of a layer's loss against the loss itself."""

import torch

from qtool.algorithms.rounding.quadratic import Sums


def _form(centered, batches=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 4, generator=generator) + 1
    y = torch.randn(2, 30, 3, generator=generator) - 2
    sums = Sums(2, 3, 4)
    for part in range(batches):
        here = slice(10 * part, 10 * part + 10)
        sums.add(x[:, here], y[:, here])
    return x, y, torch.randn(2, 3, 4, generator=generator).double(), sums.quadratic(centered)


def test_losses_are_mean_squared_errors():
    x, y, values, form = _form(centered=False)
    errors = y - x @ values.float().transpose(1, 2)
    torch.testing.assert_close(form.losses(values).float(), errors.square().mean(dim=1), rtol=1e-4, atol=1e-5)


def test_best_bias_leaves_the_variance_of_the_errors():
    x, y, values, form = _form(centered=True)
    errors = y - x @ values.float().transpose(1, 2)
    expected = errors.var(dim=1, unbiased=False)
    torch.testing.assert_close(form.losses(values).float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(form.best_bias(values).float(), errors.mean(dim=1), rtol=1e-4, atol=1e-5)


def test_a_fixed_bias_costs_what_it_misses():
    x, y, values, form = _form(centered=True)
    bias = torch.full((2, 3), 0.5, dtype=torch.float64)
    errors = y - x @ values.float().transpose(1, 2) - 0.5
    found = form.losses(values, bias).float()
    torch.testing.assert_close(found, errors.square().mean(dim=1), rtol=1e-4, atol=1e-5)


def test_damping_adds_a_share_of_the_mean_diagonal_and_pulls_to_the_weight():
    _, _, weight, form = _form(centered=True)
    hessian, linear = form.damped(0.25, weight)
    added = hessian - form.hessian
    for group in range(2):
        size = 0.25 * form.hessian[group].diagonal().mean()
        torch.testing.assert_close(added[group], size * torch.eye(4, dtype=torch.float64))
        torch.testing.assert_close(linear[group], form.linear[group] + size * weight[group])
    strong = torch.linalg.solve(*(t.mT for t in form.damped(1e9, weight))).mT
    torch.testing.assert_close(strong, weight, rtol=1e-4, atol=1e-4)


def test_no_inputs_at_all_leave_the_weight():
    sums = Sums(1, 2, 3)
    sums.add(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2))
    weight = torch.arange(6.0, dtype=torch.float64).reshape(1, 2, 3)
    hessian, linear = sums.quadratic(centered=True).damped(0.01, weight)
    torch.testing.assert_close(torch.linalg.solve(hessian, linear.mT).mT, weight)
