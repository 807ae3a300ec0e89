"""Settings with other bits, for all layers or for single ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtool.config.layers import own_settings
from qtool.config.sections import QuantizeConfig

BITS = ("bits_weights", "bits_activations")


def with_bits(
    config: QuantizeConfig, weights: int | None = None, activations: int | None = None
) -> QuantizeConfig:
    """The settings with these bits wherever there is a grid, overrides and both ends included.

    Args:
        config: what is in float in it stays there.
        weights, activations: 2 to 16; 0 leaves all in float, None leaves them as they are.
    """
    new = {key: bits for key, bits in zip(BITS, (weights, activations), strict=True) if bits is not None}
    of_all: dict[str, Any] = {key: bits for key, bits in new.items() if getattr(config, key)}
    ends = config.first_last_bits if len(new) < len(BITS) else None
    return replace(
        config,
        first_last_bits=ends,
        overrides={pattern: _with(own, new) for pattern, own in config.overrides.items()},
        **of_all,
    )


def _with(own: Mapping[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    changed = {key: bits for key, bits in new.items() if own.get(key)}
    found = {**own, **changed}
    inputs = own.get("input_overrides", {})
    if inputs:
        found["input_overrides"] = {index: _with(given, new) for index, given in inputs.items()}
    return found


def with_bits_of_layers(
    config: QuantizeConfig, names: list[str], bits: Mapping[str, Mapping[str, int]]
) -> QuantizeConfig:
    """The settings with an override of its own for each of some layers.

    Args:
        config: whose other settings hold for these layers too.
        names: all layers, in order.
        bits: by layer, what its override sets.
    """
    own = own_settings(config, names)
    single = {name: _without_idle({**own.get(name, {}), **given}) for name, given in bits.items()}
    others = {pattern: settings for pattern, settings in config.overrides.items() if pattern not in single}
    return replace(config, overrides={**single, **others})


def _without_idle(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what has no effect on a layer whose activations stay in float."""
    idle = () if settings.get("bits_activations") != 0 else ("output_range", "input_overrides")
    return {key: value for key, value in settings.items() if key not in idle}
