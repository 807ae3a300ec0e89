"""What is known of a layer when its integers are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool.algorithms.rounding.blend import blended
from qtool.algorithms.rounding.grid import RowGrid, centered_rows
from qtool.algorithms.rounding.quadratic import Quadratic, Sums
from qtool.algorithms.rounding.rows import choose_positions, grouped, groups_of, rows_at
from qtool.quantizers.lockstep import Moment, float_bias
from qtool.quantizers.plan import LayerPlan
from qtool.quantizers.weights import scaled_grid

BLENDED, SYMMETRIC = "blended", "symmetric"
TARGETS = (BLENDED, "asymmetric", SYMMETRIC)


@dataclass(frozen=True)
class Sampling:
    """Which outputs of a layer are looked at, and what they are to be.

    Args:
        rows: about so many output positions of all images together; those of each image are equally many.
        target: "asymmetric": the float network's outputs; "symmetric": what the float weight gives on
            the inputs that the quantized network has; "blended": between both, see blend.py.
        bias: whether the layer's bias may follow.
        seed: of the choice.
    """

    rows: int
    target: str
    bias: bool
    seed: int


@dataclass(frozen=True)
class Problem:
    """A layer of which integers are wanted.

    Args:
        name: of the layer.
        plan: what became of it so far.
        groups: G of the layer.
        grid: of its weight.
        weight: (G, R, K), the float weight that was quantized, float64.
        given: (G, R, K), the centered integers that it has, float64.
        bias: (G, R), what is added to its products, float64.
        follows: whether another bias may be chosen.
    """

    name: str
    plan: LayerPlan
    groups: int
    grid: RowGrid
    weight: Tensor
    given: Tensor
    bias: Tensor
    follows: bool

    @classmethod
    def of(cls, moment: Moment, module: nn.Module, follows: bool) -> Problem:
        """The problem of a layer whose float module in the network that is quantized is given."""
        plan, groups = moment.plan, groups_of(module)
        assert plan.weight is not None and plan.weight_q is not None
        weight = module.weight
        assert isinstance(weight, Tensor)
        channels = weight.shape[0]
        return cls(
            moment.name,
            plan,
            groups,
            RowGrid.of(plan.weight, channels, groups),
            grouped(weight.detach().double(), groups),
            centered_rows(plan.weight, plan.weight_q, groups),
            float_bias(module, channels).double().reshape(groups, -1),
            follows and getattr(module, "bias", None) is not None,
        )

    def values(self, centered: Tensor) -> Tensor:
        """The weight that centered integers stand for, (G, R, K), float64."""
        return centered.double() * self.grid.scale

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has a scale of its own."""
        return self.plan.weight is not None and self.plan.weight.spec.axis is not None

    def steps(self, factors: Tensor) -> Tensor:
        """What a step is worth in steps of the grid, where scales are (G, R) factors of those that it has.

        Returns:
            (G, R, 1), the factors but for what a scale cannot be.
        """
        assert self.plan.weight is not None
        weight = scaled_grid(self.plan.weight, factors.flatten(), self.plan.scale_approx_bits)
        return weight.scale.double().reshape(self.grid.scale.shape) / self.grid.scale


def pairs_of_rows(moment: Moment, module: nn.Module, sampling: Sampling) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows that a layer reads in the quantized network, and its outputs that are wanted for them.

    Args:
        moment: in front of the layer.
        module: the layer in the network that is quantized, in float.
        sampling: which rows.

    Yields:
        Batch by batch: (G, n, K) and (G, n, R), bias included, float32.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    symmetric = sampling.target == SYMMETRIC
    wanted = module if symmetric else moment.module
    weight = wanted.weight
    assert isinstance(weight, Tensor)
    groups = groups_of(module)
    turned = grouped(weight.detach(), groups).transpose(1, 2)  # (G, K, R)
    bias = float_bias(wanted, weight.shape[0]).reshape(groups, 1, -1)
    per_image = -(-sampling.rows // moment.images)
    for x, x_hat in moment.pairs():
        positions = choose_positions(module, x, per_image, generator)
        read = rows_at(module, x_hat, positions)
        source = read if symmetric else rows_at(module, x, positions)
        yield read, source @ turned + bias


def quadratic_of(problem: Problem, pairs: Iterator[tuple[Tensor, Tensor]], target: str) -> Quadratic:
    """The layer's loss on pairs of rows as a quadratic form of its weight.

    Args:
        problem: the layer.
        pairs: from pairs_of_rows for the same target.
        target: one of TARGETS.
    """
    halves = [Sums(*problem.weight.shape) for _ in range(2)]
    for x, y in pairs:
        wanted = y if problem.follows else y - problem.bias.float().unsqueeze(1)
        middle = -(-x.shape[1] // 2)  # rows lie image by image, so each half has images of its own
        halves[0].add(x[:, :middle], wanted[:, :middle])
        halves[1].add(x[:, middle:], wanted[:, middle:])
    whole = (halves[0] + halves[1]).quadratic(problem.follows)
    if not all(half.count for half in halves):
        return whole
    whole = replace(whole, halves=tuple(half.quadratic(problem.follows) for half in halves))
    return blended(whole, problem.weight) if target == BLENDED else whole
