"""The damage of each tensor at each number of bits, from one estimate for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from qtool.config import QuantizeConfig, with_bits
from qtool.graph.trace import layers
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.mixed_precision.costs import Tensors
from qtool.quantizers.plan import WEIGHTED, ModelPlan
from qtool.search.groups import Group, layer_groups
from qtool.search.mixed_precision import Knob
from qtool.search.sensitivity.estimate import ErrorSource, harm_of_errors
from qtool.search.sensitivity.points import Plans
from qtool.search.sensitivity.rounded import rounded_layers, rounded_values

ACTIVATIONS = " (output)"


@dataclass(frozen=True)
class Table:
    """What can be chosen, and what it harms.

    Args:
        traced: the float network, batch norms folded.
        plan: of the network as its settings say.
        tensors: whose bits are chosen.
        knobs: their damage for each number of bits; without costs.
    """

    traced: fx.GraphModule
    plan: ModelPlan
    tensors: Tensors
    knobs: tuple[Knob, ...]


def damage_table(
    traced: fx.GraphModule,
    stats: ModelStats,
    quantizers: QuantizeConfig,
    images: Sequence[Tensor],
    choices: Sequence[int],
    activations: bool,
    seed: int,
) -> Table:
    """The noise at the logits, as a share of their power, of each tensor alone at each number of bits.

    Args:
        traced, stats: the float network.
        quantizers: the settings of the quantizer; what they leave in float is not chosen.
        images: batches to measure on.
        choices: the numbers of bits.
        activations: whether those of outputs are chosen too.
        seed: of the estimate's random vectors.
    """
    settings = {bits: with_bits(quantizers, weights=bits, activations=0) for bits in choices}
    of_weights = {
        b: Plans(traced, stats, steps.specs_for(traced, s), layer_groups) for b, s in settings.items()
    }
    whole = Plans(traced, stats, steps.specs_for(traced, quantizers), layer_groups)
    network, folded = whole.float_network(), whole.folded.traced
    ops = {name: node.meta["op"] for name, node, _ in layers(folded)}
    sources: list[list[ErrorSource]] = []
    labels: list[tuple[str, int]] = []
    weights: dict[str, tuple[str, ...]] = {}
    for bits, plans in of_weights.items():
        for group in plans.groups:
            names = tuple(name for name in group.layers if ops[name] in WEIGHTED)
            if names:
                weights[group.name] = names
                labels.append((group.name, bits))
                sources.append([*rounded_layers(network, folded, plans.alone(group))])
    outputs: dict[str, tuple[str, ...]] = {}
    for bits in choices if activations else ():
        asked = replace(with_bits(quantizers, activations=bits), first_last_bits=None)
        plan = Plans(traced, stats, steps.specs_for(traced, asked), layer_groups)
        for group in plan.groups:
            found = rounded_values(network, folded, plan.whole, group)
            if found:
                outputs[group.name + ACTIVATIONS] = _with_output(group, plan.whole)
                labels.append((group.name + ACTIVATIONS, bits))
                sources.append([*found])
    scores = harm_of_errors(network, sources, images, seed=seed) if sources else []
    harm = {label: score.harm("sqnr") for label, score in zip(labels, scores, strict=True)}
    knobs = tuple(
        Knob(name, tuple(choices), tuple(harm[name, bits] for bits in choices))
        for name in (*weights, *outputs)
    )
    return Table(folded, whole.whole, Tensors(weights, outputs), knobs)


def _with_output(group: Group, plan: ModelPlan) -> tuple[str, ...]:
    return tuple(name for name in group.layers if plan.layers[name].output is not None)
