"""Every correction under the name that the configuration gives it, and its settings, checked."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from qtool.algorithms.activation_ranges import ActivationRangesSettings, activation_ranges
from qtool.algorithms.adaround import AdaRoundSettings, adaround
from qtool.algorithms.analytic_bias import correct_bias_without_data
from qtool.algorithms.bias_correction import (
    FastBiasSettings,
    SequentialBiasSettings,
    correct_bias,
    correct_bias_sequentially,
)
from qtool.algorithms.channel_alignment import ChannelAlignmentSettings, align_channels
from qtool.algorithms.equalization import EqualizationSettings, equalize
from qtool.algorithms.gptq import GptqSettings, gptq
from qtool.algorithms.reconstruction import ReconstructionSettings, reconstruct
from qtool.algorithms.smooth_quant import SmoothQuantSettings, smooth
from qtool.algorithms.weight_correction import WeightCorrectionSettings, correct_weights
from qtool.config import CorrectionConfig
from qtool.config.layers import matching
from qtool.errors import ConfigError, nearest

NETWORK, PLAN = "network", "plan"
WEIGHTS, OUTPUTS = "weights", "outputs"


@dataclass(frozen=True)
class Method:
    """A correction.

    Args:
        stage: NETWORK changes the float network and leaves its function; PLAN changes integers and grids.
        run: the function.
        settings: the class of its settings.
        needs: what run takes by keyword beside layers and settings: of "stats", "batches", "traced",
            "progress", "store".
        on: whether its layers are those with integer WEIGHTS, or those with OUTPUTS on a grid.
    """

    stage: str
    run: Callable[..., Any]
    settings: type
    needs: tuple[str, ...] = ()
    on: str = WEIGHTS


LEARNED = ("batches", "progress", "store")
METHODS = {
    "equalization": Method(NETWORK, equalize, EqualizationSettings, ("stats",)),
    "channel_alignment": Method(NETWORK, align_channels, ChannelAlignmentSettings, ("stats", "batches")),
    "smooth_quant": Method(NETWORK, smooth, SmoothQuantSettings, ("stats",)),
    "fast_bias_correction": Method(PLAN, correct_bias, FastBiasSettings, ("batches",)),
    "bias_correction": Method(PLAN, correct_bias_sequentially, SequentialBiasSettings, ("batches",)),
    "analytic_bias_correction": Method(PLAN, correct_bias_without_data, FastBiasSettings, ("traced",)),
    "weight_correction": Method(PLAN, correct_weights, WeightCorrectionSettings, ("batches",)),
    "activation_ranges": Method(PLAN, activation_ranges, ActivationRangesSettings, ("batches",), on=OUTPUTS),
    "gptq": Method(PLAN, gptq, GptqSettings, LEARNED),
    "adaround": Method(PLAN, adaround, AdaRoundSettings, LEARNED),
    "reconstruction": Method(PLAN, reconstruct, ReconstructionSettings, LEARNED),
}


@dataclass(frozen=True)
class Correction:
    """One correction of a run.

    Args:
        name: of the method.
        settings: of its settings class.
        exclude: patterns of layers that it leaves alone.
    """

    name: str
    settings: Any
    exclude: tuple[str, ...] = ()

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.name]

    def chosen(self, layers: list[str]) -> list[str]:
        """The layers that it may change.

        Raises:
            ConfigError: if a pattern matches none.
        """
        left = {name for pattern in self.exclude for name in matching(pattern, layers)}
        return [name for name in layers if name not in left]


def correction(asked: CorrectionConfig) -> Correction:
    """A correction with its settings checked.

    Raises:
        ConfigError: naming the setting.
    """
    cls = METHODS[asked.method].settings
    hints = typing.get_type_hints(cls)
    where = f"corrections: {asked.method}"
    values: dict[str, Any] = {}
    for name, value in asked.settings.items():
        if name not in {f.name for f in fields(cls)}:
            known = ", ".join([*(f.name for f in fields(cls)), "exclude"])
            raise ConfigError(
                f"{where}: unknown setting {name!r}{nearest(str(name), hints)}; it takes {known}"
            )
        values[name] = _typed(value, hints[name], f"{where}.{name}")
    try:
        return Correction(asked.method, cls(**values), asked.exclude)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _typed(value: Any, wanted: Any, where: str) -> Any:
    """A value of a YAML file as the type that a setting has."""
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (wanted,) = (option for option in typing.get_args(wanted) if option is not type(None))
    origin = typing.get_origin(wanted) or wanted
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {str(k): _typed(v, typing.get_args(wanted)[1], f"{where}.{k}") for k, v in value.items()}
    elif wanted is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is wanted:
        return value
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a name"}
    raise ConfigError(f"{where}: found {value!r}; {names.get(wanted, 'a mapping')} is wanted")
