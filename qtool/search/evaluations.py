"""What searches share: one network's losses under many specs, and a journal of what was computed.

A search is deterministic, given the numbers that it computes. The journal keeps these numbers, exact,
in the order in which they were found; a search that was killed starts again from its beginning,
reads them in place of computing them, and so comes back to where it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qtool.errors import ConfigError, OutputError
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.numerics.logits import logits_of
from qtool.numerics.metrics import top_k_correct
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.quantizers.plan import plan_model
from qtool.quantizers.prepare import QuantizedModel, build

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Score:
    """How well a network does: mean cross-entropy, and top-1 in percent."""

    loss: float
    top1: float


class Trials:
    """Quantizes one network in many ways, and scores each on the same images.

    Args:
        traced: the float network.
        stats: of the same network.
        batches: images and labels, which stay in memory.
        device: where the network runs.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        stats: ModelStats,
        batches: Sequence[tuple[Tensor, Tensor]],
        device: str | torch.device = "cpu",
    ) -> None:
        self.folded = fold_batch_norms(traced)
        self.stats = move_stats(stats, self.folded.pairs)
        self.batches = [(images.to(device), labels.to(device)) for images, labels in batches]
        self.device = torch.device(device)

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

    def quantize(self, specs: Mapping[str, LayerSpec]) -> QuantizedModel:
        """The network quantized as specs say."""
        return build(self.folded, plan_model(self.folded.traced, self.stats, specs))

    def score(self, specs: Mapping[str, LayerSpec]) -> Score:
        """How well the network does when it is quantized as specs say."""
        model = self._on_device(self.quantize(specs))
        loss, correct = 0.0, 0
        with torch.no_grad():
            for x, labels in self.batches:
                logits = logits_of(model(x))
                loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
                correct += int(top_k_correct(logits, labels, 1).sum())
        return Score(loss / self.images, 100 * correct / self.images)


class Journal:
    """Remembers named numbers; use as a function of a name and of what computes them.

    Args:
        known: from read_journal, or empty.
        file: takes a line for each name that is computed.

    Attributes:
        computed: how many numbers, or groups of them, were.
        taken: how many came from known.
    """

    def __init__(self, known: Mapping[str, Sequence[float]], file: IO[str]) -> None:
        self._values = dict(known)
        self._not_taken = set(known)
        self._file = file
        self.computed = self.taken = 0

    def __call__(self, name: str, compute: Callable[[], Sequence[float]]) -> Sequence[float]:
        if name in self._values:
            self.taken += name in self._not_taken
            self._not_taken.discard(name)
            return self._values[name]
        values = [float(v) for v in compute()]
        self.computed += 1
        self._values[name] = values
        _write_line(self._file, {"name": name, "values": [v.hex() for v in values]})
        return values


@contextmanager
def open_journal(path: Path, inputs: Mapping[str, Any], earlier: Path | None = None) -> Iterator[Journal]:
    """A new journal that takes over the entries of an earlier one.

    Args:
        path: of the new one.
        inputs: all that the numbers depend on, as plain values.
        earlier: a journal that must have the same inputs.

    Raises:
        ConfigError: if it is no journal, or has other inputs.
        OutputError: if the new one cannot be written.
    """
    known = {} if earlier is None else read_journal(earlier, inputs)
    try:
        with path.open("w", encoding="utf-8") as file:
            _write_line(file, {"inputs": inputs})
            for name, values in known.items():
                _write_line(file, {"name": name, "values": [v.hex() for v in values]})
            yield Journal(known, file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_line(file: IO[str], entry: Mapping[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()  # so that it outlives the process


def read_journal(path: Path, inputs: Mapping[str, Any]) -> dict[str, list[float]]:
    """The numbers of a journal by name; a last line that was not finished is left out.

    Raises:
        ConfigError: if it cannot be read, is no journal, or has other inputs.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        first, *entries = (json.loads(line) for line in lines)
        before = first["inputs"]
        known = {e["name"]: [float.fromhex(v) for v in e["values"]] for e in entries}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; no search to resume") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the journal of a search; no search to resume") from error
    now = json.loads(json.dumps(inputs))
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        raise ConfigError(
            f"{path}: is of a search with other {', '.join(different)}; resume it with the settings of its "
            "config.yaml, or start a new one"
        )
    return known
