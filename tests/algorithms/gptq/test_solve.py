"""Error feedback and descent against brute force and against GPTQ as it is published."""

import itertools

import pytest
import torch

from qtool.algorithms.gptq.solve import Feedback, descend

LOW, HIGH = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (-2.0, 1.0))


def _problem(seed, inputs=8, channels=1, groups=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, inputs, 3 * inputs, generator=generator, dtype=torch.float64)
    x = x + 2 * torch.randn(groups, 1, 3 * inputs, generator=generator, dtype=torch.float64)  # correlated
    u = 1.5 * torch.randn(groups, channels, inputs, generator=generator, dtype=torch.float64) - 0.5
    return u, x @ x.mT


def _loss(u, q, hessian):
    e = u - q
    return torch.einsum("grk,grk->gr", e @ hessian, e)


def _natural(hessian):
    return torch.arange(hessian.shape[-1]).expand(hessian.shape[0], -1)


def _fed(u, hessian, order, block=128):
    return Feedback(u @ hessian, hessian, order, block).integers(torch.ones_like(LOW), LOW, HIGH)


def _nearest(u):
    return torch.round(u).clamp(LOW, HIGH)


def _published(u, hessian, low, high):
    """Algorithm 1 of the paper, one row, one column at a time."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w, q = u.clone(), torch.zeros_like(u)
    for j in range(len(u)):
        q[j] = w[j].round().clamp(low, high)
        w[j + 1 :] -= (w[j] - q[j]) / upper[j, j] * upper[j, j + 1 :]
    return q


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [2, 3, 128])
def test_going_backward_gives_the_integers_of_the_published_algorithm(seed, block):
    u, hessian = _problem(seed, channels=2)
    found = _fed(u, hessian, _natural(hessian), block)
    expected = torch.stack([_published(row, hessian[0], -2, 1) for row in u[0]])
    assert torch.equal(found[0].double(), expected)


def test_a_diagonal_hessian_gives_the_nearest():
    u, _ = _problem(0, inputs=20, channels=4)
    hessian = torch.diag(torch.arange(1.0, 21, dtype=torch.float64)).unsqueeze(0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    found = _fed(u, hessian, order, 4)
    assert torch.equal(found.double(), _nearest(u))
    assert torch.equal(descend(found, hessian, u @ hessian, LOW, HIGH, 3, 4), found)


def test_other_steps_are_another_grid():
    u, hessian = _problem(1, channels=3)
    steps = torch.tensor([0.5, 1.0, 1.7], dtype=torch.float64).reshape(1, 3, 1)
    found = Feedback(u @ hessian, hessian, _natural(hessian)).integers(steps, LOW, HIGH)
    assert torch.equal(found, _fed(u / steps, hessian, _natural(hessian)))


def test_eight_weights_come_close_to_the_best_of_all_integers():
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=8)), dtype=torch.float64).unsqueeze(0)
    best, found, nearest = [], [], []
    for seed in range(12):
        u, hessian = _problem(seed)
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=1, descending=True)
        fed = _fed(u, hessian, order)
        q = descend(fed, hessian, u @ hessian, LOW, HIGH, 20)
        best.append(float(_loss(u, every, hessian).min()))
        found.append(float(_loss(u, q.double(), hessian)))
        nearest.append(float(_loss(u, _nearest(u), hessian)))
    assert all(b <= f + 1e-9 for b, f in zip(best, found, strict=True))
    # Of what the nearest integers lose against the best of all, nine tenths are won.
    assert sum(found) - sum(best) < 0.1 * (sum(nearest) - sum(best))


@pytest.mark.parametrize("block", [1, 3, 128])
def test_descent_never_grows_the_loss_and_ends_where_no_single_step_helps(block):
    u, hessian = _problem(3, inputs=12, channels=5, groups=2)
    found, losses = _nearest(u), []
    for sweeps in (0, 1, 2, 50):
        found = descend(_nearest(u), hessian, u @ hessian, LOW, HIGH, sweeps, block).double()
        losses.append(_loss(u, found, hessian))
    assert all(bool((after <= before + 1e-9).all()) for before, after in itertools.pairwise(losses))
    assert float(losses[-1].sum()) < float(losses[0].sum())
    for column, step in itertools.product(range(12), (-1, 1)):
        other = found.clone()
        other[..., column] = (other[..., column] + step).clamp(-2, 1)
        assert bool((_loss(u, other, hessian) >= losses[-1] - 1e-6).all())


def test_the_size_of_a_block_does_not_matter():
    u, hessian = _problem(4, inputs=40, channels=6, groups=3)
    start = _nearest(u)
    whole = descend(start, hessian, u @ hessian, LOW, HIGH, 4)
    assert torch.equal(whole, descend(start, hessian, u @ hessian, LOW, HIGH, 4, block=7))


def test_groups_are_solved_each_on_its_own():
    u, hessian = _problem(5, inputs=9, channels=2, groups=3)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=1, descending=True)
    together = _fed(u, hessian, order)
    for g in range(3):
        one = slice(g, g + 1)
        alone = _fed(u[one], hessian[one], order[one])
        assert torch.equal(together[one], alone)
