"""LAPQ: choose the ranges of all tensors together, by the loss of the quantized network.

Two steps. Each tensor alone gets the range whose quantization error is smallest in the p-norm; p is
the one whose ranges give the network the smallest loss, found by a parabola through several. From
there a search without derivatives moves all ranges together.

Reference:
    Nahshan et al. 2021, "Loss Aware Post-training Quantization", arXiv:1911.07190.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import basinhopping, minimize
from torch import Tensor, fx, nn

from qtool.errors import ConfigError
from qtool.graph.fold import output_channels_first
from qtool.graph.trace import layers
from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.clipping import range_of_tensor
from qtool.numerics.spec import ACIQ_MAX_BITS, ClipSpec, LayerSpec, QuantSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.plan import FAKE, INTEGER, WEIGHTS_ONLY, LayerPlan, output_ranges, plan_model

Specs = Mapping[str, LayerSpec]
Vector = NDArray[np.float64]
# From the name of a computation and the computation to its numbers, computed or remembered.
Memo = Callable[[str, Callable[[], Sequence[float]]], Sequence[float]]

CLIPPED_STARTS = ("none", "avg", "gauss", "laplace")
P_STARTS = {"l1": 1.0, "l2": 2.0, "l3": 3.0}
P_VALUES = tuple(float(p) for p in np.linspace(2, 4, 10))
# Values of one tensor that its p-norm is computed on.
SAMPLE = 1 << 15
# Ranges stay within 2^-16 and 2^16 of where they start.
MAX_OCTAVES = 16.0


@dataclass(frozen=True)
class LapqSpec:
    """How to search.

    Args:
        init_mode: "auto" for the best p, one of P_STARTS, or one of CLIPPED_STARTS.
        init_method: SciPy's name of the method that finds the range of one tensor.
        method: SciPy's name of the method that moves all of them.
        maxiter, maxfev: limits of its iterations and of its evaluations, None for SciPy's own.
        basinhopping: whether to repeat it from points nearby, chosen at random.
        basinhopping_niter: how often.
        both_ends: whether the ends of an asymmetric range move independently.
        seed: of basinhopping.
    """

    init_mode: str = "auto"
    init_method: str = "Powell"
    method: str = "Powell"
    maxiter: int | None = 2
    maxfev: int | None = None
    basinhopping: bool = False
    basinhopping_niter: int = 100
    both_ends: bool = False
    seed: int = 0


@dataclass(frozen=True)
class SearchedTensor:
    """A weight or an output whose range is searched.

    The search speaks of octaves: at o the range is 2^o times the one at 0.

    Args:
        layer: whose it is.
        part: "weight" or "output".
        grid: what it is quantized to.
        low, high: a range around zero, shape () or, per channel, (C,).
        factors: by which low and high are multiplied at 0 octaves.
        numbers: 1 if both ends move together, 2 if each has octaves of its own.
        values: some of its values, (C, n) or (n,).
    """

    layer: str
    part: str
    grid: QuantSpec
    low: Tensor
    high: Tensor
    factors: tuple[float, float]
    numbers: int
    values: Tensor

    def factors_at(self, octaves: Vector) -> tuple[float, float]:
        """The factors on low and high."""
        first, last = (2.0 ** float(np.clip(octaves[i], -MAX_OCTAVES, MAX_OCTAVES)) for i in (0, -1))
        return self.factors[0] * first, self.factors[1] * last

    def error_at(self, octaves: Vector, p: float) -> float:
        """What quantization with this range costs the values, see lp_error."""
        low, high = self.factors_at(octaves)
        return lp_error(self.values, self.low * low, self.high * high, self.grid, p)

    def asked_at(self, octaves: Vector) -> dict[str, tuple[float, float]]:
        """The fields of a LayerSpec that give it this range."""
        low, high = self.factors_at(octaves)
        if self.part == "weight":
            return {"weight_range_factors": (low, high)}
        return {"output_range": (float(self.low) * low, float(self.high) * high)}


@dataclass(frozen=True)
class LapqState:
    """How far a search is.

    Args:
        phase: what it is doing, in words.
        evaluations: of the loss so far.
        loss: of the last one.
        best_loss: the smallest so far.
        best: the specs that gave it.
    """

    phase: str
    evaluations: int
    loss: float
    best_loss: float
    best: Specs


@dataclass(frozen=True)
class LapqResult:
    """What a search found.

    Args:
        specs: of the smallest loss.
        initial_loss, loss: of the initialisation, and of specs.
        initial: specs of the initialisation.
        p: of the norm that the initialisation minimises, or None.
        losses_of_p: the loss of each p that was tried.
        evaluations: of the loss.
        tensors: how many ranges were searched.
    """

    specs: Specs
    initial_loss: float
    loss: float
    initial: Specs
    p: float | None
    losses_of_p: Mapping[float, float]
    evaluations: int
    tensors: int


def lp_error(x: Tensor, x_min: Tensor, x_max: Tensor, grid: QuantSpec, p: float) -> float:
    """The mean of |x - x_hat|^p.

    Args:
        x: values, (C, n) or (n,).
        x_min, x_max: the range that is quantized to, () or (C,).
        grid: what it is quantized to.
        p: positive.

    Example:
        >>> grid = QuantSpec(num_bits=2, narrow_range=True)
        >>> lp_error(torch.tensor([0.5, 3.0]), torch.tensor(-1.0), torch.tensor(1.0), grid, p=2)
        2.125
    """
    x_hat = fake_quantize(x, qparams_from_range(x_min, x_max, grid))
    return float((x - x_hat).abs().double().pow(p).mean())


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where the parabola of least squares through points is smallest.

    None if it opens downwards or has its minimum beyond the points.

    Example:
        >>> round(parabola_minimum([2, 3, 4], [2.0, 1.0, 2.0]), 6)
        3.0
        >>> parabola_minimum([2, 3, 4], [1.0, 2.0, 1.0]) is None
        True
    """
    square, linear, _ = np.polyfit(x, y, 2)
    if not square > 0:
        return None
    minimum = float(-linear / (2 * square))
    return minimum if min(x) <= minimum <= max(x) else None


def with_ranges(specs: Specs, tensors: Sequence[SearchedTensor], vector: Vector) -> dict[str, LayerSpec]:
    """The specs with every searched range as a vector of octaves says."""
    changed = dict(specs)
    for tensor, octaves in zip(tensors, split(vector, tensors), strict=True):
        changed[tensor.layer] = replace(changed[tensor.layer], **tensor.asked_at(octaves))  # type: ignore[arg-type]
    return changed


def split(vector: Vector, tensors: Sequence[SearchedTensor]) -> list[Vector]:
    """The part of a vector that belongs to each tensor."""
    return np.split(vector, np.cumsum([t.numbers for t in tensors])[:-1])


def sample_outputs(traced: fx.GraphModule, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Up to SAMPLE values of each layer's output, evenly spaced, by layer name.

    Args:
        traced: the float network, batch norms folded, on the device of the batches.
        batches: its inputs.
    """
    parts: dict[str, list[Tensor]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                parts.setdefault(name, []).append(_thinned(output.reshape(-1), SAMPLE // len(batches)))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, _, module in layers(traced)]
    try:
        with torch.no_grad():
            for batch in batches:
                traced(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(found).cpu() for name, found in parts.items()}


def _thinned(x: Tensor, count: int) -> Tensor:
    """At most about count values along the last axis, evenly spaced."""
    return x[..., :: -(-x.shape[-1] // max(1, count))].clone()


def searched_tensors(
    traced: fx.GraphModule,
    stats: ModelStats,
    specs: Specs,
    outputs: Mapping[str, Tensor],
    settings: LapqSpec,
) -> list[SearchedTensor]:
    """Every weight and output on a grid, in the order of execution.

    Args:
        traced, stats: batch norms folded.
        specs: without clipping.
        outputs: from sample_outputs.
        settings: init_mode says where the ranges start, both_ends how many numbers each has.

    Raises:
        ConfigError: if there are none.
    """
    clip = settings.init_mode if settings.init_mode in CLIPPED_STARTS else "none"
    planned = plan_model(traced, stats, specs).layers
    ranges = output_ranges(traced, stats, {name: _clipped(spec, clip) for name, spec in specs.items()})
    found = []
    for name, _, module in layers(traced):
        plan = planned[name]
        if plan.kind in (INTEGER, WEIGHTS_ONLY) and plan.weight is not None:
            found.append(_searched_weight(name, module, specs[name], clip, settings.both_ends))
        if plan.kind in (INTEGER, FAKE) and plan.output is not None:
            found.append(_searched_output(name, plan, ranges[name], outputs[name], settings.both_ends))
    if not found:
        raise ConfigError("nothing to search: no layer is quantized")
    return found


def _clipped(spec: LayerSpec, mode: str) -> LayerSpec:
    """The spec with outputs clipped, where the mode has constants for their grid."""
    possible = spec.output is None or spec.output.num_bits <= ACIQ_MAX_BITS
    return replace(spec, clip=replace(spec.clip, mode=mode if possible else "none"))


def _searched_weight(
    name: str, module: nn.Module, spec: LayerSpec, clip: str, both_ends: bool
) -> SearchedTensor:
    grid, weight = spec.weight, output_channels_first(module).detach()
    assert grid is not None
    low, high = _around_zero(*range_of_tensor(weight, grid))
    factors = spec.weight_range_factors or (1.0, 1.0)
    if clip != "none" and grid.axis is None and grid.num_bits <= ACIQ_MAX_BITS:
        how = ClipSpec(clip, to_observed=spec.clip.to_observed)
        clipped = _around_zero(*range_of_tensor(weight, grid, how))
        if grid.symmetric:
            factors = (_quotient(max(-clipped[0], clipped[1]), max(-low, high)),) * 2
        else:
            factors = (_quotient(clipped[0], low), _quotient(clipped[1], high))
    rows = weight.flatten(1)
    values = _thinned(rows, SAMPLE // len(rows))
    numbers = _numbers(grid, float(low.min()), float(high.max()), both_ends)
    return SearchedTensor(name, "weight", grid, low, high, factors, numbers, values)


def _searched_output(
    name: str, plan: LayerPlan, found: tuple[float, float], values: Tensor, both_ends: bool
) -> SearchedTensor:
    assert plan.output is not None
    low, high = _around_zero(torch.tensor(found[0]), torch.tensor(found[1]))
    if plan.activation is not None:  # it is quantized behind its activation
        values = values.clamp(0, 6 if plan.activation == "relu6" else None)
    numbers = _numbers(plan.output.spec, float(low), float(high), both_ends)
    return SearchedTensor(name, "output", plan.output.spec, low, high, (1.0, 1.0), numbers, values)


def _numbers(grid: QuantSpec, low: float, high: float, both_ends: bool) -> int:
    return 2 if both_ends and not grid.symmetric and low < 0 < high else 1


def _around_zero(x_min: Tensor, x_max: Tensor) -> tuple[Tensor, Tensor]:
    """The range widened to hold zero, as every grid does."""
    return x_min.clamp(max=0), x_max.clamp(min=0)


def _quotient(a: Tensor, b: Tensor) -> float:
    return float(a) / float(b) if float(b) and float(a) else 1.0


def lapq(
    tensors: Sequence[SearchedTensor],
    specs: Specs,
    loss: Callable[[Specs], float],
    settings: LapqSpec,
    memo: Memo = lambda _key, compute: compute(),
    watch: Callable[[LapqState], None] = lambda _state: None,
) -> LapqResult:
    """Find the ranges of the smallest loss.

    Args:
        tensors: from searched_tensors.
        specs: without clipping.
        loss: of the network quantized by some specs.
        settings: how to search.
        memo: remembers numbers, so that a search that was ended can be repeated quickly.
        watch: is told after every evaluation.
    """
    search = _Search(tensors, specs, loss, memo, watch)
    p: float | None = None
    losses_of_p: dict[float, float] = {}
    start = np.zeros(sum(t.numbers for t in tensors))
    if settings.init_mode in P_STARTS:
        p = P_STARTS[settings.init_mode]
        start = search.ranges_of_p(p, settings.init_method)
    elif settings.init_mode == "auto":
        p, losses_of_p = search.best_p(settings.init_method)
        start = search.ranges_of_p(p, settings.init_method)
    search.phase = "the initialisation"
    initial_loss = search(start)
    search.minimize(start, settings)
    return LapqResult(
        search.best,
        initial_loss,
        search.best_loss,
        search.specs_at(start),
        p,
        losses_of_p,
        search.evaluations,
        len(tensors),
    )


class _Search:
    """Evaluates vectors of octaves, and keeps the best."""

    def __init__(
        self,
        tensors: Sequence[SearchedTensor],
        specs: Specs,
        loss: Callable[[Specs], float],
        memo: Memo,
        watch: Callable[[LapqState], None],
    ) -> None:
        self.tensors, self.specs, self.loss, self.memo, self.watch = tensors, specs, loss, memo, watch
        self.phase = ""
        self.evaluations = 0
        self.best: Specs = specs
        self.best_loss = float("inf")

    def specs_at(self, vector: Vector) -> dict[str, LayerSpec]:
        return with_ranges(self.specs, self.tensors, vector)

    def __call__(self, vector: Vector) -> float:
        asked = [t.asked_at(o) for t, o in zip(self.tensors, split(vector, self.tensors), strict=True)]
        key = hashlib.sha256(repr(asked).encode()).hexdigest()
        specs = self.specs_at(vector)
        (loss,) = self.memo(f"loss {key}", lambda: (self.loss(specs),))
        self.evaluations += 1
        if loss < self.best_loss:
            self.best, self.best_loss = specs, loss
        self.watch(LapqState(self.phase, self.evaluations, loss, self.best_loss, self.best))
        return loss

    def ranges_of_p(self, p: float, method: str) -> Vector:
        """For each tensor alone, the octaves of the smallest error in the p-norm."""
        found: list[float] = []
        for tensor in self.tensors:
            key = f"p {p!r} {tensor.layer} {tensor.part}"
            found += self.memo(key, lambda t=tensor: _fit(t, p, method))  # type: ignore[misc]
        return np.array(found)

    def best_p(self, method: str) -> tuple[float, dict[float, float]]:
        """The p whose ranges give the smallest loss, and the losses of all that were tried."""
        losses: dict[float, float] = {}
        for p in P_VALUES:
            self.phase = f"the initialisation with p = {p:.3g}"
            losses[p] = self(self.ranges_of_p(p, method))
        p_fitted = parabola_minimum(list(losses), list(losses.values()))
        if p_fitted is not None:
            self.phase = f"the initialisation with p = {p_fitted:.3g}"
            losses[p_fitted] = self(self.ranges_of_p(p_fitted, method))
        return min(losses, key=lambda p: losses[p]), losses

    def minimize(self, start: Vector, settings: LapqSpec) -> None:
        """Search from a start; what was found is in best and best_loss."""
        iteration = 1

        def count(*_: Any) -> None:
            nonlocal iteration
            iteration += 1
            self.phase = f"iteration {iteration}"

        self.phase = "iteration 1"
        limits = {"maxiter": settings.maxiter, "maxfev": settings.maxfev}
        options = {name: limit for name, limit in limits.items() if limit is not None}
        if settings.basinhopping:
            _basinhopping(
                self,
                start,
                niter=settings.basinhopping_niter,
                minimizer_kwargs={"method": METHODS[settings.method], "options": options},
                callback=count,
                seed=np.random.default_rng(settings.seed),
            )
        else:
            _minimize(self, start, method=METHODS[settings.method], options=options, callback=count)


def _fit(tensor: SearchedTensor, p: float, method: str) -> list[float]:
    """The octaves of the smallest error in the p-norm."""
    start = np.zeros(tensor.numbers)
    unit = tensor.error_at(start, p) or 1.0  # some methods stop at an absolute difference
    found = _minimize(lambda octaves: tensor.error_at(octaves, p) / unit, start, method=METHODS[method])
    return [float(octave) for octave in np.atleast_1d(found.x)]


def _nelder_mead(objective: Any, start: Vector, callback: Any, **options: Any) -> Any:
    """SciPy's, with a simplex of half an octave; its own is too small to leave a plateau."""
    limits: dict[str, Any] = {name: options[name] for name in ("maxiter", "maxfev") if name in options}
    simplex = np.vstack([start, start + 0.5 * np.eye(len(start))])
    return _minimize(
        objective,
        start,
        method="Nelder-Mead",
        options={"initial_simplex": simplex, **limits},
        callback=callback,
    )


# SciPy's stubs do not know methods of one's own.
_minimize: Any = minimize
_basinhopping: Any = basinhopping
METHODS: dict[str, Any] = {"Powell": "Powell", "Nelder-Mead": _nelder_mead}
