"""Steps for given integers, against all that are tried."""

import hypothesis
import hypothesis.strategies as st
import torch

from qtool.algorithms.gptq.scales import FACTORS, refitted_steps


def _problem(seed, channels):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 30, 5, generator=generator, dtype=torch.float64)
    u, q = 3 * torch.randn(2, 2, channels, 5, generator=generator, dtype=torch.float64)
    return u, x.mT @ x, q.round()


@hypothesis.given(st.integers(0, 10**6), st.integers(1, 3))
@hypothesis.settings(deadline=None)
def test_refitted_steps_lose_least_of_all_within_the_limits(seed, channels):
    u, hessian, q = _problem(seed, channels)
    hypothesis.assume(bool((q != 0).any(dim=2).all()))

    def loss(steps):
        e = u - q * steps.unsqueeze(2)
        return torch.einsum("grk,grk->gr", e @ hessian, e)

    found = refitted_steps(u @ hessian, hessian, q, torch.ones(2, channels, dtype=torch.float64))
    best = loss(found)
    for factor in torch.linspace(FACTORS[0], FACTORS[-1], 31, dtype=torch.float64):
        assert bool((best <= loss(factor.expand(2, channels)) * (1 + 1e-9)).all())


def test_channels_of_zeros_keep_their_steps():
    u, hessian, q = _problem(0, 2)
    q[0, 1] = 0
    steps = torch.full((2, 2), 1.1, dtype=torch.float64)
    found = refitted_steps(u @ hessian, hessian, q, steps)
    assert float(found[0, 1]) == float(steps[0, 1])
    assert bool((found[1] != steps[1]).all())
