"""One network's losses under many specs, each for little more than what it changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.replay import MAX_BYTES, Replay
from qtool.numerics.logits import logits_of
from qtool.numerics.metrics import top_k_correct
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.adjust import Adjustable
from qtool.quantizers.plan import chosen_grids, plan_model
from qtool.quantizers.prepare import QuantizedModel, build

Specs = Mapping[str, LayerSpec]
Network = TypeVar("Network", bound=nn.Module)

# The fields of a LayerSpec that only move the grids of its weight and its output.
RANGES = ("output_range", "weight_range", "weight_range_factors", "weight_clip")


@dataclass(frozen=True)
class Score:
    """How well a network does: mean cross-entropy, and top-1 in percent."""

    loss: float
    top1: float


class Trials:
    """Quantizes one network in many ways, and scores each on the same images.

    Specs that differ from those of the last trial in ranges alone change the network in place, and run
    from the first layer that they change; others quantize it anew.

    Args:
        traced: the float network.
        stats: of the same network.
        batches: images and labels, which stay in memory.
        device: where the network runs.
        max_bytes: see graph.replay.Replay.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        stats: ModelStats,
        batches: Sequence[tuple[Tensor, Tensor]],
        device: str | torch.device = "cpu",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.folded = fold_batch_norms(traced)
        self.stats = move_stats(stats, self.folded.pairs)
        self.batches = [(images.to(device), labels.to(device)) for images, labels in batches]
        self.device = torch.device(device)
        self.max_bytes = max_bytes
        self._current: _Current | None = None

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(len(labels) for _, labels in self.batches)

    def float_network(self) -> fx.GraphModule:
        """The network itself, batch norms folded, where the images are."""
        return self._on_device(self.folded.traced)

    def _on_device(self, network: Network) -> Network:
        # Layers are shared between networks; a copy keeps the others where they are.
        return network if self.device.type == "cpu" else copy.deepcopy(network).to(self.device)

    def quantize(self, specs: Specs) -> QuantizedModel:
        """The network quantized as specs say."""
        return build(self.folded, plan_model(self.folded.traced, self.stats, specs))

    @torch.no_grad()
    def score(self, specs: Specs) -> Score:
        """How well the network does when it is quantized as specs say."""
        loss, correct = 0.0, 0
        outputs = self._outputs(specs)
        for output, (_, labels) in zip(outputs, self.batches, strict=True):
            logits = logits_of(output)
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            correct += int(top_k_correct(logits, labels, 1).sum())
        return Score(loss / self.images, 100 * correct / self.images)

    def seconds(self, layer: str) -> float | None:
        """About how long a trial takes that moves ranges of one layer only; None before the first."""
        return None if self._current is None else self._current.replay.seconds_behind({layer})

    def _outputs(self, specs: Specs) -> Iterator[Any]:
        specs = dict(specs)  # the caller may change theirs
        current, changed = self._current, None
        self._current = None  # until the network is what the specs say
        if current is not None and only_ranges_differ(current.specs, specs):
            names = [name for name in specs if specs[name] != current.specs[name]]
            weights, outputs = chosen_grids(self.folded.traced, self.stats, specs, names)
            changed = current.adjustable.change(weights, outputs)
            current = replace(current, specs=specs)
        else:
            plan = plan_model(self.folded.traced, self.stats, specs)
            adjustable = Adjustable(self.folded, plan, self.device)
            images = [x for x, _ in self.batches]
            current = _Current(specs, adjustable, Replay(adjustable.model.network, images, self.max_bytes))
        self._current = current
        return current.replay.run(changed)


@dataclass(frozen=True)
class _Current:
    """The network of the last trial."""

    specs: Specs
    adjustable: Adjustable
    replay: Replay


def only_ranges_differ(before: Specs, after: Specs) -> bool:
    """Whether specs ask for the same network, up to the ranges of weights and outputs."""
    blank = dict.fromkeys(RANGES)
    return before.keys() == after.keys() and all(
        a is b or replace(a, **blank) == replace(b, **blank)  # type: ignore[arg-type]
        for a, b in ((before[name], after[name]) for name in before)
    )
