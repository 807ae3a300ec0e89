"""Choose the integers of one layer after another, each behind a prefix that is quantized already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qtool.algorithms.progress import Meter, ShowProgress
from qtool.algorithms.records import CorrectionReport, LayerChange, relative_change
from qtool.algorithms.rounding.grid import integers_of_rows
from qtool.algorithms.rounding.problem import Problem, Sampling, pairs_of_rows
from qtool.algorithms.rounding.rows import grouped, groups_of, has_rows
from qtool.algorithms.store import LayerStore
from qtool.graph.fold import Folded
from qtool.graph.trace import layers as traced_layers
from qtool.quantizers.lockstep import Lockstep, Moment, integer_layers
from qtool.quantizers.plan import ModelPlan
from qtool.quantizers.weights import weight_values

# How far apart the seeds of two networks' first layers are; more than any network has layers.
SEEDS_APART = 100_003


@dataclass(frozen=True)
class Choice:
    """The integers that a method chose.

    Args:
        centered: (G, R, K).
        bias: (G, R), None leaves it.
        before, after: the mean squared error as a share of the mean square of the outputs.
        numbers: more to report, by a text with a place for each.
        scale: (G, R, 1), of the weight's grid; None leaves it.
    """

    centered: Tensor
    bias: Tensor | None
    before: float
    after: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    scale: Tensor | None = None


Rows = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Method:
    """A method that chooses the integers of a layer.

    Args:
        name: as in the `corrections:` list.
        choose: finds them for a layer and what gives its rows, anew each time; with a seed, and a function
            to be told which share of the work is done.
        work: of a layer with a weight of shape (G, R, K), in a unit of its own.
        sampling: of the rows.
        max_inputs: layers with more inputs, K, are left alone.
    """

    name: str
    choose: Callable[[Problem, Rows, int, Callable[[float], None]], Choice]
    work: Callable[[torch.Size], float]
    sampling: Sampling
    max_inputs: int


def round_layers(
    method: Method,
    lockstep: Lockstep,
    layers: Collection[str],
    progress: ShowProgress | None = None,
    store: LayerStore | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Other integers, and where the method asks for it other biases and scales, for some layers.

    Args:
        method: how they are chosen.
        lockstep: both networks, at their beginning.
        layers: the names of those that may change.
        progress: is told at every layer, and by the method.
        store: results of an earlier, unfinished run of the same; None for none.

    Returns:
        Changed copies, and what was changed.
    """
    modules = {name: module for name, _, module in traced_layers(lockstep.folded.traced)}
    numbered = {name: number for number, name in enumerate(integer_layers(lockstep.reference, lockstep.plan))}
    reasons = {name: _reason(modules[name], method.max_inputs) for name in numbered if name in layers}
    parts = [(name, method.work(_shape(modules[name]))) for name, why in reasons.items() if not why]
    left = {name: why for name, why in reasons.items() if why}
    meter = Meter(parts, progress)
    meter.start()
    changed = []
    for moment in lockstep.moments():
        if reasons.get(moment.name) != "":
            continue
        key = f"{method.name}.{moment.name}"
        entry = None if store is None else store.get(key)
        if entry is None:
            entry = _found(method, moment, modules[moment.name], numbered[moment.name], meter)
            if store is not None and entry is not None:
                store.put(key, entry)
            meter.done()
        else:
            meter.skip()
        if entry is None:
            left[moment.name] = "it reads or gives NaN or infinity"
        else:
            changed.append(_applied(lockstep, moment, entry))
    return lockstep.folded, lockstep.plan, CorrectionReport(method.name, tuple(changed), left)


def _reason(module: nn.Module, max_inputs: int) -> str:
    """Why a layer is left alone, or ""."""
    if not has_rows(module):
        return "a transposed convolution, which is no matrix product of its inputs"
    inputs = _shape(module)[2]
    return f"{inputs} inputs; at most {max_inputs} are taken" if inputs > max_inputs else ""


def _shape(module: nn.Module) -> torch.Size:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (
        grouped(weight, groups_of(module)).shape if has_rows(module) else torch.Size((1, 1, weight.numel()))
    )


def _found(
    method: Method, moment: Moment, module: nn.Module, number: int, meter: Meter
) -> dict[str, Tensor] | None:
    """What is kept of a layer: integers, bias, scales, numbers for the report; None where there is NaN."""
    sampling = replace(method.sampling, seed=method.sampling.seed * SEEDS_APART + number)
    problem = Problem.of(moment, module, sampling.bias)
    try:
        choice = method.choose(
            problem, lambda: pairs_of_rows(moment, module, sampling), sampling.seed, meter.within
        )
    except NotFiniteError:
        return None
    assert moment.plan.weight is not None and moment.plan.weight_q is not None
    weight_q = integers_of_rows(moment.plan.weight, choice.centered, moment.plan.weight_q.shape)
    entry = {"weight_q": weight_q}
    if choice.bias is not None:
        entry["bias"] = choice.bias.flatten().float()
    if choice.scale is not None:
        entry["scale"] = choice.scale.flatten().float()
    differ = 100 * float((weight_q != moment.plan.weight_q).double().mean())
    numbers = {
        "loss {:.3g}": choice.before,
        " -> {:.3g} of the outputs' power": choice.after,
        ", {:.1f} % of the integers are others": differ,
        **choice.numbers,
    }
    return entry | {text: torch.tensor(value, dtype=torch.float64) for text, value in numbers.items()}


def _applied(lockstep: Lockstep, moment: Moment, entry: Mapping[str, Tensor]) -> LayerChange:
    """Give a layer what was found for it."""
    grid, before, weight_q = moment.plan.weight, moment.plan.weight_q, entry["weight_q"]
    assert grid is not None and before is not None
    new = replace(grid, scale=entry["scale"]) if "scale" in entry else grid
    lockstep.change(moment.name, weight_q=weight_q, bias=entry.get("bias"), weight=new)
    note = "".join(text.format(float(value)) for text, value in entry.items() if "{" in text)
    size = relative_change(weight_values(new, weight_q), weight_values(grid, before))
    return LayerChange(moment.name, size, note)


class NotFiniteError(ValueError):
    """The rows of a layer hold NaN or infinity."""
