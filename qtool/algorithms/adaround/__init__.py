"""AdaRound: learn for each weight of a layer whether it is rounded up or down.

Reference:
    Nagel et al. 2020, arXiv:2004.10568; the start from GPTQ's integers is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qtool.algorithms.adaround.learn import Cached, Schedule, learn, on_form, on_rows, outputs
from qtool.algorithms.gptq import GptqSettings, choose_integers
from qtool.algorithms.progress import ShowProgress
from qtool.algorithms.records import CorrectionReport
from qtool.algorithms.rounding.passes import Choice, Method, Rows, round_layers
from qtool.algorithms.rounding.problem import BLENDED, TARGETS, Problem, Sampling, quadratic_of
from qtool.algorithms.rounding.quadratic import Quadratic
from qtool.algorithms.store import LayerStore
from qtool.graph.fold import Folded
from qtool.quantizers.lockstep import Lockstep
from qtool.quantizers.plan import ModelPlan

NAME = "adaround"
STARTS = ("gptq", "nearest")


@dataclass(frozen=True)
class AdaRoundSettings:
    """How AdaRound learns.

    Args:
        start: "gptq": from the integers of GPTQ with descent; "nearest": from those that a layer has.
        target: see GptqSettings.
        iterations: steps for each layer.
        learning_rate: of Adam.
        batch: output positions of a step.
        regularizer: weight of the indecision against the loss, which counts as 1 at the start.
        warm_up: share of the steps without it, below 1.
        rows: output positions that are kept in memory, with their inputs, of all images together.
        bias: whether the bias is learned too.
        max_inputs: layers with more inputs per output are left alone.
        seed: of the choice of positions.

    Raises:
        ValueError: if one is out of range.
    """

    start: str = "gptq"
    target: str = BLENDED
    iterations: int = 500
    learning_rate: float = 0.03
    batch: int = 512
    regularizer: float = 300.0
    warm_up: float = 0.2
    rows: int = 8192
    bias: bool = True
    max_inputs: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, found {self.start!r}")
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {', '.join(TARGETS)}, found {self.target!r}")
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up must be from 0 to below 1, found {self.warm_up}")
        for name in ("learning_rate", "regularizer"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        for name, smallest in (("iterations", 1), ("batch", 1), ("rows", 1), ("max_inputs", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, found {getattr(self, name)}")


def adaround(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: AdaRoundSettings,
    progress: ShowProgress | None = None,
    store: LayerStore | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Learn the integers of layers one after another, each for the inputs that it then has.

    The loss is that behind the ReLU or ReLU6 that a layer computes; layers without one are learned on the
    quadratic form of all rows. No output channel gets a larger loss on the rows than the integers that
    it has had, or than those that it starts from.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the one that the plan quantizes.
        plan: static, of folded.
        batches: images.
        layers: the names of the layers that may change.
        settings: see there.
        progress: is told at every layer, and twenty times within it.
        store: results of an earlier, unfinished run of the same; None for none.

    Returns:
        The network with other biases, the plan with other integers, and what was changed.
    """
    sampling = Sampling(settings.rows, settings.target, settings.bias, settings.seed)

    def choose(problem: Problem, rows: Rows, seed: int, within: Callable[[float], None]) -> Choice:
        return learn_integers(
            problem, Cached.of(rows(), problem.plan.activation_limit), settings, seed, within
        )

    def work(shape: torch.Size) -> float:
        groups, channels, inputs = shape
        sums = groups * inputs**2 * settings.rows
        return sums + 4 * settings.iterations * groups * channels * inputs * settings.batch

    method = Method(NAME, choose, work, sampling, settings.max_inputs)
    return round_layers(method, Lockstep(reference, folded, plan, batches), layers, progress, store)


def learn_integers(
    problem: Problem,
    cached: Cached,
    settings: AdaRoundSettings,
    seed: int,
    within: Callable[[float], None] = lambda share: None,
) -> Choice:
    """The integers of one layer, channel by channel no worse than those that it has.

    Raises:
        NotFiniteError: if the rows hold NaN or infinity.
    """
    activation = problem.plan.activation
    form = quadratic_of(problem, iter([(cached.x, cached.y)]), settings.target)
    if form.wanted is not None:
        bias = form.best_bias(form.wanted) if problem.follows else problem.bias
        cached = replace(cached, y=outputs(cached.x, form.wanted.float(), bias.float()))
    on_its_grid = GptqSettings(target=settings.target, bias=settings.bias, search_scales=False)
    fed = choose_integers(problem, form, on_its_grid)
    start = fed.centered if settings.start == "gptq" else problem.given
    start_bias = _bias(problem, form, start)
    if activation is None:
        error_of = on_form(form)
    else:
        generator = torch.Generator().manual_seed(seed)
        error_of = on_rows(cached, activation, settings.batch, generator)
    schedule = Schedule(
        settings.iterations,
        settings.learning_rate,
        settings.batch,
        settings.regularizer,
        settings.warm_up,
    )
    found, bias, undecided = learn(problem, start, start_bias, error_of, schedule, within)
    found = found.double()
    if activation is None:
        bias = _bias(problem, form, found)
    options = [(problem.given, problem.bias), (start, start_bias), (found, bias)]
    return _best(problem, cached, options, activation, 100 * undecided)


def _bias(problem: Problem, form: Quadratic, centered: Tensor) -> Tensor:
    """(G, R): the best one where the bias may follow, else the one that the layer has."""
    return form.best_bias(problem.values(centered)) if problem.follows else problem.bias


def _best(
    problem: Problem,
    cached: Cached,
    options: Sequence[tuple[Tensor, Tensor]],
    activation: str | None,
    undecided: float,
) -> Choice:
    """Of each output channel the best of several integers and biases."""
    losses = torch.stack(
        [cached.losses(problem.values(centered), bias, activation) for centered, bias in options]
    )
    best = losses.argmin(dim=0)  # (G, R)
    centered = torch.stack([c for c, _ in options]).gather(
        0, best[None, :, :, None].expand(1, *problem.weight.shape)
    )[0]
    bias = torch.stack([b for _, b in options]).gather(0, best[None])[0]
    silent = torch.zeros_like(problem.weight)
    power = float(cached.losses(silent, torch.zeros_like(problem.bias), activation).sum().clamp(min=1e-300))
    return Choice(
        centered,
        bias if problem.follows else None,
        float(losses[0].sum()) / power,
        float(losses.min(dim=0).values.sum()) / power,
        {", {:.2f} % undecided before hardening": undecided},
    )
