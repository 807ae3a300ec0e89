"""Where outputs are read, and shifts that make means equal there."""

import math

import pytest
import torch
from torch import nn

from qtool.algorithms import read_point as module
from qtool.algorithms.read_point import ReadPoint, Sampler, read_point, shift_behind
from qtool.quantizers.lockstep import Lockstep

INF = torch.tensor(math.inf)
BOUND = torch.full((6,), 4.0, dtype=torch.float64)


def _relu(x, high):
    return torch.minimum(x.clamp(min=0), high).double().mean(dim=1)


@pytest.mark.parametrize(
    "high", [INF, torch.tensor(6.0), torch.linspace(0.5, 3, 6)[:, None]], ids=["relu", "relu6", "capped"]
)
def test_shifts_are_taken_back(high):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5000, generator=generator)
    moved = torch.tensor([0.0, 0.1, -0.1, 0.7, -0.7, 1.5])
    shift, solved = shift_behind(x + moved[:, None], _relu(x, high), high, BOUND)
    assert bool(solved.all())
    assert torch.allclose(shift, -moved.double(), atol=2e-3)
    assert shift[0] == 0


def test_noise_that_leaves_the_mean_is_answered_by_a_lower_bias():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5000, generator=generator)
    noisy = x + torch.randn(6, 5000, generator=generator)
    noisy += (x.mean(dim=1) - noisy.mean(dim=1))[:, None]
    shift, solved = shift_behind(noisy, _relu(x, INF), INF, BOUND)
    assert bool(solved.all()) and bool((shift < -0.1).all())
    found = _relu(noisy + shift.float()[:, None], INF)
    assert torch.allclose(found, _relu(x, INF), atol=1e-4)


def test_channels_that_are_never_active_stay_and_what_cannot_be_reached_is_said():
    values = torch.full((6, 10), -1.0)
    wanted = torch.tensor([0.0, 0.5, 2.9, 3.1, 9.0, 0.0], dtype=torch.float64)
    shift, solved = shift_behind(values, wanted, INF, BOUND)
    assert solved.tolist() == [True, True, True, False, False, True]
    assert shift[solved].tolist() == pytest.approx([0, 1.5, 3.9, 0], abs=1e-4)
    assert bool((shift.abs() <= 4).all())


@pytest.mark.parametrize("shape", [(24, 3, 8, 8), (24, 3, 7, 7), (24, 3)], ids=str)
def test_the_same_elements_are_taken_however_images_came_in_batches(shape, monkeypatch):
    monkeypatch.setattr(module, "MOST", 900)
    x, axis = torch.arange(math.prod(shape)).reshape(shape), 1 - len(shape)
    found = []
    for size in (1, 5, 24):
        sampler = Sampler(axis, x.numel())
        found.append(torch.cat([sampler.take(part) for part in x.split(size)], dim=1))
        assert torch.equal(found[-1], found[0])
    assert found[0].numel() <= 900
    if len(shape) == 4:  # no column is passed over
        assert len((found[0][0] % shape[3]).unique()) == shape[3]


class Block(nn.Module):
    """Two residual sums: over one layer, and with a layer on both ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in "abcd")
        self.e, self.f = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.relu, self.relu6, self.dropout = nn.ReLU(), nn.ReLU6(), nn.Dropout()

    def forward(self, x):
        x = self.relu6(self.a(x))
        x = (x + self.dropout(self.b(x))).relu()
        x = self.c(x) + self.d(x)
        y = self.e(x)
        return self.f(y).relu() + y


def _points(case):
    lockstep = Lockstep(*case.given)
    return {moment.name: read_point(lockstep, moment.name) for moment in lockstep.moments()}


def test_outputs_are_read_behind_relus_and_sums(planned, tiny_batches):
    points = _points(planned(Block(), tiny_batches))
    assert points["a"].add is None and float(points["a"].high) == 6
    assert points["b"].add is not None and points["b"].operand == 0 and float(points["b"].high) == math.inf
    assert points["c"] == ReadPoint()  # what d adds is not there yet
    assert (points["d"].add, points["d"].operand, points["d"].high) == (points["d"].add, 0, None)
    assert points["d"].add is not None and points["d"].add != points["b"].add
    assert points["e"] == ReadPoint()  # two readers
    assert points["f"].add is None and float(points["f"].high) == math.inf


def test_a_value_that_is_added_to_itself_or_scaled_is_not_looked_behind(planned, tiny_batches):
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.a(x)
            return torch.add(x, self.b(y + y), alpha=2)

    assert set(_points(planned(Sums(), tiny_batches)).values()) == {ReadPoint()}
