"""The greedy search for clip modes: layer after layer, the mode that scores best is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from qtool.graph.neighbours import fused_activations
from qtool.graph.trace import layers
from qtool.numerics.spec import ACIQ_MAX_BITS, LayerSpec
from qtool.quantizers.plan import quantizes_output
from qtool.search.trials import Score

Specs = Mapping[str, LayerSpec]
MODES = ("none", "avg", "gauss", "laplace")


@dataclass(frozen=True)
class Choice:
    """What was found for one layer: its clip mode, and the score of each that was tried."""

    layer: str
    mode: str
    scores: Mapping[str, Score]

    @property
    def score(self) -> Score:
        """Of the mode that was kept."""
        return self.scores[self.mode]


def candidates(layer: str, specs: Mapping[str, Specs]) -> list[str]:
    """The clip modes that make a difference to a layer, and have constants for its grid.

    Args:
        layer: its name.
        specs: by clip mode, of all layers.
    """
    output = specs["none"][layer].output
    narrow = output is not None and output.num_bits <= ACIQ_MAX_BITS
    possible = MODES if narrow else MODES[:2]
    return [m for m in possible if m == "none" or specs[m][layer] != specs["none"][layer]]


def layers_to_decide(traced: fx.GraphModule, specs: Specs) -> list[str]:
    """The layers whose outputs get a grid of their own, in the order of execution; batch norms are folded."""
    names = [name for name, node, _ in layers(traced) if quantizes_output(node, specs.get(name))]
    fused = {activation for activation, _ in fused_activations(traced, set(names)).values()}
    return [name for name in names if name not in fused]


def search_clipping(
    traced: fx.GraphModule, specs: Mapping[str, Specs], score: Callable[[str, Specs], Score]
) -> Iterator[Choice]:
    """Decide layer after layer, in the order of execution; those not decided yet stay in float.

    The highest top-1 wins, then the lowest loss, then the first of MODES.

    Args:
        traced: batch norms folded.
        specs: by clip mode, of all layers.
        score: of the network under some specs; its first argument names the trial.
    """
    undecided = set(layers_to_decide(traced, specs["none"]))
    decided: dict[str, LayerSpec] = {}
    for name, _, _ in layers(traced):
        best = "none"
        if name in undecided:
            scores = {
                mode: score(f"{name} {mode}", {**decided, name: specs[mode][name]})
                for mode in candidates(name, specs)
            }
            best = max(scores, key=lambda mode: (scores[mode].top1, -scores[mode].loss))
            yield Choice(name, best, scores)
        decided[name] = specs[best][name]
