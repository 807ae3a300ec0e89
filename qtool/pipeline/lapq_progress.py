"""What a run shows of LAPQ while it searches, and the file with the best ranges so far."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qtool.algorithms.lapq import LapqSpec, LapqState, SearchedTensor, seconds_left
from qtool.config import Config, dump_quantizers, with_settings_of_layers
from qtool.config.sections import QuantizeConfig
from qtool.numerics.spec import LayerSpec
from qtool.run_dir import write_text
from qtool.search.trials import Trials

LOG = logging.getLogger("qtool")

RANGES_FILE = "quant_params_dict.yaml"
SEARCHED_FIELDS = ("output_range", "weight_range_factors")
SECONDS_BETWEEN_BARS = 0.5


class LapqProgress:
    """Shows a bar or lines, and writes the best ranges whenever the search enters another phase.

    Args:
        config: of the run.
        folder: of the run.
        quantizers: the settings that the search started from.
        settings, tensors: of the search.
        trials: what it evaluates with, which knows how long a trial takes.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        quantizers: QuantizeConfig,
        settings: LapqSpec,
        tensors: Sequence[SearchedTensor],
        trials: Trials,
    ) -> None:
        self.path = folder / RANGES_FILE
        self.quantizers = quantizers
        self.settings = settings
        self.layers = [tensor.layer for tensor in tensors for _ in range(tensor.numbers)]
        self.trials = trials
        self.every = config.data.print_freq
        self.last: LapqState | None = None
        self.next_bar = 0.0
        self.bar: tqdm[Any] = tqdm(
            desc="LAPQ", unit="trial", leave=False, disable=None if self.every is None else True
        )

    def __enter__(self) -> LapqProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def watch(self, state: LapqState) -> None:
        """Show how far the search is."""
        self.bar.update()
        if not self.bar.disable and time.monotonic() > self.next_bar:
            self.next_bar = time.monotonic() + SECONDS_BETWEEN_BARS
            self.bar.set_postfix_str(f"{state.phase}, best loss {state.best_loss:.6g}{self._left(state)}")
        if self.every is not None and state.evaluations % self.every == 0:
            self._log(state)
        if self.last is not None and self.last.phase != state.phase:
            self._log(self.last)
            self.write(self.last.best)
        self.last = state

    def _log(self, state: LapqState) -> None:
        LOG.info(
            "LAPQ: %s: loss %.6g, best %.6g, %d evaluations%s",
            state.phase, state.loss, state.best_loss, state.evaluations, self._left(state),
        )  # fmt: skip

    def _left(self, state: LapqState) -> str:
        """About how long the search takes from here, where that can be told."""
        by_line = self.settings.method == "Powell" and not self.settings.basinhopping
        costs = {layer: self.trials.seconds(layer) for layer in dict.fromkeys(self.layers)}
        known = [seconds for layer in self.layers if (seconds := costs[layer]) is not None]
        if state.pace is None or not by_line or len(known) < len(self.layers):
            return ""
        left = seconds_left(state.pace, known, self.settings.maxiter, self.settings.maxfev)
        return "" if left is None else f", about {tqdm.format_interval(left)} left"

    def write(self, specs: Mapping[str, LayerSpec]) -> None:
        """Write the settings that give these specs, in a file that 'quantize -c' takes."""
        found = {
            name: {key: getattr(spec, key) for key in SEARCHED_FIELDS if getattr(spec, key) is not None}
            for name, spec in specs.items()
        }
        names = list(specs)
        found = {name: settings for name, settings in found.items() if settings}
        write_text(self.path, dump_quantizers(with_settings_of_layers(self.quantizers, names, found)))
