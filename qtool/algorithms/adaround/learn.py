"""Learn the integers of one layer, by its loss behind the activation that it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.algorithms.rounding.problem import Problem
from qtool.algorithms.rounding.quadratic import Quadratic
from qtool.algorithms.rounding.soft import SoftIntegers, annealed
from qtool.quantizers.limits import activated


@dataclass(frozen=True)
class Cached:
    """The rows of a layer, at once.

    Args:
        x: (G, n, K), what it reads.
        y: (G, n, R), the outputs that are wanted for them, in front of the activation.
        limit: (G, 1, R), of a ReLU6 whose upper end differs between channels, see LayerPlan.
    """

    x: Tensor
    y: Tensor
    limit: Tensor | None = None

    @classmethod
    def of(cls, pairs: Iterator[tuple[Tensor, Tensor]], limit: Tensor | None = None) -> Cached:
        """All rows of all batches; limit is that of a LayerPlan."""
        parts = zip(*pairs, strict=True)
        x, y = (torch.cat(part, dim=1) for part in parts)
        if limit is not None:
            limit = limit.expand(y.shape[0] * y.shape[2], *limit.shape[1:]).reshape(y.shape[0], 1, -1)
        return cls(x, y, limit)

    def losses(self, values: Tensor, bias: Tensor, activation: str | None) -> Tensor:
        """The mean squared error of each output channel behind the activation, (G, R), float64."""
        found = outputs(self.x, values.float(), bias.float())
        return self._errors(found, self.y, activation).square().mean(dim=1).double()

    def errors_at(self, rows: Tensor, values: Tensor, bias: Tensor, activation: str | None) -> Tensor:
        """(G, n, R): the errors behind the activation of some rows, by number."""
        return self._errors(outputs(self.x[:, rows], values, bias), self.y[:, rows], activation)

    def _errors(self, found: Tensor, wanted: Tensor, activation: str | None) -> Tensor:
        return activated(found, activation, self.limit) - activated(wanted, activation, self.limit)


def outputs(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """What a layer gives for rows (G, n, K), with weights (G, R, K) and bias (G, R): (G, n, R)."""
    return x @ values.mT + bias.unsqueeze(1)


@dataclass(frozen=True)
class Schedule:
    """How integers are learned.

    Args:
        iterations: steps of Adam.
        learning_rate: of V.
        batch: rows of a step.
        regularizer: weight of the indecision against the loss, which is 1 at the start.
        warm_up: share of the steps without it.
        beta: its exponent, at first and in the end.
    """

    iterations: int
    learning_rate: float
    batch: int
    regularizer: float
    warm_up: float
    beta: tuple[float, float] = (20.0, 2.0)


def learn(
    problem: Problem,
    start: Tensor,
    bias: Tensor,
    error_of: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    within: Callable[[float], None],
) -> tuple[Tensor, Tensor, float]:
    """Integers by gradient descent.

    Args:
        problem: the layer.
        start: (G, R, K), the integers to start from.
        bias: (G, R), to start from; it stays if problem.follows is false.
        error_of: the loss of soft weights (G, R, K) and a bias (G, R), in any unit; (), differentiable.
        schedule: of the steps.
        within: is told the share of the steps that is done.

    Returns:
        The integers (G, R, K), the bias (G, R), and the share of undecided ones before they were decided.
    """
    scale = problem.grid.scale.float()
    integers = SoftIntegers(problem.weight / problem.grid.scale, start, problem.grid.low, problem.grid.high)
    with torch.no_grad():
        unit = error_of(start.float() * scale, bias.float()).clamp(min=torch.finfo(torch.float32).tiny)
    # Steps of the bias are about as large for the outputs as those of a step of every weight.
    reach = scale.mean(dim=(1, 2)).reshape(-1, 1)
    shift = torch.zeros_like(bias, dtype=torch.float32, requires_grad=problem.follows)
    optimizer = torch.optim.Adam([integers.v, *([shift] if problem.follows else [])], schedule.learning_rate)
    told = max(1, schedule.iterations // 20)
    with torch.enable_grad():
        for step in range(schedule.iterations):
            share = step / schedule.iterations
            loss = error_of(integers.soft() * scale, bias.float() + shift * reach) / unit
            beta = annealed(share, schedule.warm_up, *schedule.beta)
            if beta is not None:
                loss = loss + schedule.regularizer * integers.indecision(beta)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % told == 0:
                within(share)
    undecided = integers.undecided() / math.prod(integers.v.shape)
    return integers.hard(), bias + (shift * reach).detach().double(), undecided


def on_rows(
    cached: Cached, activation: str | None, batch: int, generator: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    """The squared error behind an activation, on other rows at each call."""
    count = cached.x.shape[1]

    def error_of(values: Tensor, bias: Tensor) -> Tensor:
        chosen = torch.randint(count, (min(batch, count),), generator=generator)
        return cached.errors_at(chosen, values, bias, activation).square().mean(dim=1).sum()

    return error_of


def on_form(form: Quadratic) -> Callable[[Tensor, Tensor], Tensor]:
    """The squared error of a layer without activation, on all rows; the best bias goes without saying."""
    hessian, linear = (form.hessian / form.count).float(), (form.linear / form.count).float()
    power = float(form.power.sum()) / form.count

    def error_of(values: Tensor, _bias: Tensor) -> Tensor:
        return ((values @ hessian - 2 * linear) * values).sum() + power

    return error_of
