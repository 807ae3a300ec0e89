"""Learn the integers of a block's weights, its biases and the scales of its outputs together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qtool.algorithms.reconstruction.grids import RandomMasks
from qtool.algorithms.reconstruction.images import BlockImages, Place
from qtool.algorithms.reconstruction.simulate import SimulatedBlock
from qtool.algorithms.rounding.soft import annealed

UNITS = ("block", "layer")


@dataclass(frozen=True)
class ReconstructionSettings:
    """How blocks are learned.

    Args:
        unit: what is learned together: "block", or "layer" for each layer alone.
        iterations: steps of Adam for each block.
        batch: images of a step.
        images: at most so many are used, the first ones.
        learning_rate: of the integers.
        bias_learning_rate: of the biases, in steps of the weights' grids.
        scale_learning_rate: of the logarithm of outputs' scales; 0 leaves these as they are.
        held_out: share of the images that are not learned from, and decide whether what was learned is
            better; 0 decides by those that it was learned from.
        drop: probability with which an activation is left off its grid in a step, element by element: 0.5 in
            the paper; from GPTQ's integers 0 was measured to be better.
        regularizer: weight of the indecision against the loss, which counts as 1 at the start.
        warm_up: share of the steps without it, below 1.
        max_layers: blocks with more layers are taken apart into single ones.
        seed: of the choice of images and elements.

    Raises:
        ValueError: if one is out of range.
    """

    unit: str = "block"
    iterations: int = 300
    batch: int = 16
    images: int = 256
    learning_rate: float = 0.03
    bias_learning_rate: float = 0.01
    scale_learning_rate: float = 0.003
    held_out: float = 0.1
    drop: float = 0.0
    regularizer: float = 100.0
    warm_up: float = 0.2
    max_layers: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, found {self.unit!r}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be from 0 to below 1, found {self.warm_up}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be from 0 to below 1, found {self.held_out}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be from 0 to 1, found {self.drop}")
        for name in ("learning_rate", "regularizer"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("bias_learning_rate", "scale_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")
        for name in ("iterations", "batch", "images", "max_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, found {self.seed}")


@dataclass(frozen=True)
class Learned:
    """What was learned of a block.

    Args:
        before, after: the squared error on the images to judge by, as a share of the squared targets.
        undecided: share of the integers that were undecided before they were decided.
        kept: whether what was learned is better than what the block had; otherwise it keeps that.
    """

    before: float
    after: float
    undecided: float
    kept: bool


def learn_block(
    block: SimulatedBlock,
    images: BlockImages,
    settings: ReconstructionSettings,
    seed: int,
    within: Callable[[float], None],
) -> Learned:
    """Learn a block, in place; afterwards its weights are decided.

    Memory is that of one step: the block's activations and gradients for settings.batch images, and four
    numbers for each weight.

    Args:
        block: to be learned.
        images: what it reads, and is to give.
        settings: see there.
        seed: of everything random.
        within: is told the share of the steps that is done.
    """
    learn, judge = images.divided(settings.held_out)
    _decide(block, learned=False)
    before, power = _error(block, images, judge, settings.batch)
    unit, _ = (before, power) if learn is judge else _error(block, images, learn, settings.batch)
    _undecide(block)
    with torch.enable_grad():
        _steps(block, images, learn, settings, unit / len(learn), seed, within)
    count = sum(math.prod(w.integers.v.shape) for w in block.weights.values())
    undecided = sum(w.integers.undecided() for w in block.weights.values()) / max(count, 1)
    _decide(block, learned=True)
    after, _ = _error(block, images, judge, settings.batch)
    kept = after < before
    if not kept:
        _decide(block, learned=False)
        for grid in block.outputs.values():
            grid.log_ratio.data.zero_()
    power = max(power, torch.finfo(torch.float64).tiny)
    return Learned(before / power, min(before, after) / power, undecided, kept)


def _steps(
    block: SimulatedBlock,
    images: BlockImages,
    places: Sequence[Place],
    settings: ReconstructionSettings,
    unit: float,
    seed: int,
    within: Callable[[float], None],
) -> None:
    """All steps of Adam; unit is the error of an image at the start."""
    generator = torch.Generator().manual_seed(seed)
    optimizer, schedule = _optimizer(block, settings)
    told = max(1, settings.iterations // 20)
    masks = RandomMasks(1 - settings.drop, generator) if settings.drop > 0 else None
    unit = max(unit, torch.finfo(torch.float32).tiny)
    count = sum(math.prod(w.integers.v.shape) for w in block.weights.values())
    for step in range(settings.iterations):
        share = step / settings.iterations
        chosen = torch.randperm(len(places), generator=generator)[: settings.batch].tolist()
        read, floats, targets = images.pick([places[i] for i in chosen])
        x = read if masks is None else torch.lerp(floats, read, masks(read.shape))
        y = block(x, masks)
        loss = (y - targets).square().sum() / (len(chosen) * unit)
        beta = annealed(share, settings.warm_up, 20.0, 2.0)
        if beta is not None:
            for weight in block.weights.values():
                part = math.prod(weight.integers.v.shape) / count
                loss = loss + settings.regularizer * part * weight.integers.indecision(beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % told == 0:
            within(share)


def _optimizer(
    block: SimulatedBlock, settings: ReconstructionSettings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam; integers come to rest by the regularizer, the others by a rate that falls to 0."""
    integers = [weight.integers.v for weight in block.weights.values()]
    shifts = [weight.shift for weight in block.weights.values() if weight.shift is not None]
    scales = [grid.log_ratio for grid in block.outputs.values() if grid.log_ratio.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": integers, "lr": settings.learning_rate},
            {"params": shifts, "lr": settings.bias_learning_rate},
            {"params": scales, "lr": settings.scale_learning_rate},
        ]
    )

    def cosine(step: int) -> float:
        return (1 + math.cos(math.pi * min(step / settings.iterations, 1))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, cosine, cosine])


def _decide(block: SimulatedBlock, learned: bool) -> None:
    for weight in block.weights.values():
        weight.decided = weight.result() if learned else weight.start()


def _undecide(block: SimulatedBlock) -> None:
    for weight in block.weights.values():
        weight.decided = None


def _error(
    block: SimulatedBlock, images: BlockImages, places: Sequence[Place], size: int
) -> tuple[float, float]:
    """The squared error over some images, nothing left off its grid, and the squared targets."""
    error = power = 0.0
    with torch.no_grad():
        for start in range(0, len(places), size):
            read, _, targets = images.pick(places[start : start + size])
            error += float((block(read) - targets).double().square().sum())
            power += float(targets.double().square().sum())
    return error, power
