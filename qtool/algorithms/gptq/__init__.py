"""GPTQ: integers of weights with error feedback, for linear layers and convolutions, without gradients.

Reference:
    Frantar et al. 2022, arXiv:2210.17323; Behdin et al. 2023, arXiv:2309.01885, for the descent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qtool.algorithms.gptq.scales import FACTORS, search_steps
from qtool.algorithms.gptq.solve import Feedback, descend
from qtool.algorithms.progress import ShowProgress
from qtool.algorithms.records import CorrectionReport
from qtool.algorithms.rounding.passes import Choice, Method, NotFiniteError, Rows, round_layers
from qtool.algorithms.rounding.problem import BLENDED, TARGETS, Problem, Sampling, quadratic_of
from qtool.algorithms.rounding.quadratic import Quadratic
from qtool.algorithms.store import LayerStore
from qtool.graph.fold import Folded
from qtool.quantizers.lockstep import Lockstep
from qtool.quantizers.plan import ModelPlan

NAME = "gptq"


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ chooses integers.

    Args:
        target: what the outputs of a layer are to be: "asymmetric": those of the float network, errors of
            earlier layers included; "symmetric": what the float weight gives on the inputs it has;
            "blended": between both, as rows that are held out ask for.
        damping: share of the mean of the Hessian's diagonal that is added to it, above 0; more trusts the
            images less.
        act_order: whether inputs are rounded in the order of their power, the largest first.
        sweeps: at most so many passes of descent behind it, 0 for none.
        search_scales: whether the scales of a weight with one for each output channel are chosen too, see
            scales.py.
        rows: output positions of a layer that are looked at, in all images together.
        bias: whether the bias follows the weights.
        max_inputs: layers with more inputs per output are left alone; the Hessian has as many rows.
        seed: of the choice of positions.

    Raises:
        ValueError: if one is out of range.
    """

    target: str = BLENDED
    damping: float = 0.1
    act_order: bool = True
    sweeps: int = 10
    search_scales: bool = True
    rows: int = 16384
    bias: bool = True
    max_inputs: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, found {self.target!r}")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping must be above 0, found {self.damping}")
        for name, smallest in (("sweeps", 0), ("rows", 1), ("max_inputs", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, found {getattr(self, name)}")


def gptq(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: GptqSettings,
    progress: ShowProgress | None = None,
    store: LayerStore | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Choose the integers of layers one after another, each for the inputs that it then has.

    No output channel gets a larger loss on the rows than the integers that it has had. Costs about three
    runs of both networks, and K^2 (K / 3 + C_out (2 + sweeps)) products for a layer with K inputs;
    K^2 (2 K / 3 + 24 C_out) more where scales are searched.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the one that the plan quantizes.
        plan: static, of folded.
        batches: images.
        layers: the names of the layers that may change.
        settings: see there.
        progress: is told at every layer.
        store: results of an earlier, unfinished run of the same; None for none.

    Returns:
        The network with other biases, the plan with other integers and scales, and what was changed.
    """
    sampling = Sampling(settings.rows, settings.target, settings.bias, settings.seed)

    def choose(problem: Problem, rows: Rows, _seed: int, _within: Callable[[float], None]) -> Choice:
        return choose_integers(problem, quadratic_of(problem, rows(), settings.target), settings)

    def work(shape: torch.Size) -> float:
        groups, channels, inputs = shape
        chosen = inputs / 3 + channels * (2 + settings.sweeps)
        searched = 2 * inputs / 3 + 4 * len(FACTORS) * channels if settings.search_scales else 0
        return groups * inputs**2 * (settings.rows + chosen + searched)

    method = Method(NAME, choose, work, sampling, settings.max_inputs)
    return round_layers(method, Lockstep(reference, folded, plan, batches), layers, progress, store)


def choose_integers(problem: Problem, quadratic: Quadratic, settings: GptqSettings) -> Choice:
    """The integers of one layer, channel by channel no worse than those that it has.

    Raises:
        NotFiniteError: if the form holds NaN or infinity.
    """
    if not bool(quadratic.power.isfinite().all() & quadratic.hessian.isfinite().all()):
        raise NotFiniteError
    grid = problem.grid
    hessian, linear = quadratic.damped(settings.damping, problem.weight)
    linear = linear / grid.scale
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    order = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    if not settings.act_order:
        order = torch.arange(diagonal.shape[1]).expand_as(order)
    steps = torch.ones_like(grid.scale)
    if settings.search_scales and problem.per_channel and quadratic.halves:
        steps = search_steps(problem, quadratic, settings.damping, order)
    found = Feedback(linear, hessian, order).integers(steps, grid.low, grid.high)
    if settings.sweeps:
        found = descend(found, hessian, linear / steps, grid.low, grid.high, settings.sweeps)
    return better_rows(problem, quadratic, found.double(), steps)


def better_rows(problem: Problem, quadratic: Quadratic, found: Tensor, steps: Tensor) -> Choice:
    """Of each output channel the better of the integers found and those that it has.

    Args:
        problem: the layer.
        quadratic: its loss.
        found: (G, R, K), integers.
        steps: (G, R, 1), what a step of theirs is worth, in steps of the grid that the layer has.
    """
    given, new = problem.values(problem.given), problem.values(found) * steps
    kept = (quadratic.losses(new) > quadratic.losses(given)).unsqueeze(2)
    centered = torch.where(kept, problem.given, found)
    values = torch.where(kept, given, new)
    steps = torch.where(kept, 1.0, steps)
    # The share of the outputs as they are: with their means, where these were taken off.
    power = quadratic.power / quadratic.count
    if quadratic.centered:
        power = power + quadratic.mean_y.square()
    others = bool((steps != 1).any())
    total = max(float(power.sum()), torch.finfo(torch.float64).tiny)
    return Choice(
        centered,
        quadratic.best_bias(values) if problem.follows else None,
        float(quadratic.losses(given, problem.bias).sum()) / total,
        float(quadratic.losses(values).sum()) / total,
        {", scales times {:.3g} on average": float(steps.mean())} if others else {},
        problem.grid.scale * steps if others else None,
    )
