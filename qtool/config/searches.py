"""Searches for ranges and clip modes: which settings fit together, and the file of what was found."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtool.config.layers import own_settings
from qtool.config.options import options_of
from qtool.config.sections import Config, QuantizeConfig
from qtool.errors import ConfigError
from qtool.numerics.spec import ACIQ_MODES

LOG = logging.getLogger("qtool")


def check_search(config: Config, searches: bool) -> None:
    """Refuse options of a search that it cannot honour, and any of them where there is no search.

    Args:
        config: checked otherwise.
        searches: whether the command is one that always searches, and not by LAPQ.

    Raises:
        ConfigError: naming the flag.
    """
    lapq = config.lapq
    if not searches and not lapq.enabled:
        _note_clip_to_observed(config.quantizers)
        refuse_given(config, ("lapq",), "has an effect with --qe-lapq only; add that")
        _refuse_without_search(config)
        return
    if searches:
        refuse_given(config, ("corrections",), "is of 'qtool quantize', not of this search")
        refuse_given(config, ("lapq",), "is of 'qtool quantize', not of this search")
    name = "--qe-lapq" if lapq.enabled else "search-clipping"
    if config.quantizers.dynamic:
        raise ConfigError(f"{name}: searches for static ranges; leave out --qe-dynamic")
    if lapq.enabled and config.quantizers.no_clip_layers:
        raise ConfigError("--qe-no-clip-layers: --qe-lapq chooses all ranges; leave one of the two out")
    if lapq.basinhopping_niter != type(lapq).basinhopping_niter and not lapq.basinhopping:
        raise ConfigError(
            "--lapq-basinhopping-niter: has an effect with --lapq-basinhopping only; add that too"
        )


def _refuse_without_search(config: Config) -> None:
    """Corrections can be resumed, and have no trials."""
    search = config.search
    if search.eval_size != type(search).eval_size:
        reason = "has an effect with --qe-lapq only"
        if config.corrections.asked:
            reason += "; --corrections-images says how many images corrections look at"
        raise ConfigError(f"--lapq-eval-size: {reason}; leave it out")
    if search.resume is not None and not config.corrections.asked:
        raise ConfigError(
            "--resume-search-from: has an effect with --qe-lapq or --corrections only; add one, or leave it "
            "out"
        )


def _note_clip_to_observed(config: QuantizeConfig) -> None:
    # No error: the file of a search keeps the setting, though it may clip no layer in that way.
    variants = [config, *(replace(config, **settings) for settings in config.overrides.values())]
    chosen = [v for v in variants if v.clip_to_observed]
    of_inputs = [given.get("clip_activations") for v in chosen for given in v.input_overrides.values()]
    modes = {v.clip_activations for v in chosen} | {*of_inputs}
    if chosen and modes.isdisjoint(ACIQ_MODES):
        LOG.warning("--qe-clip-to-observed: has no effect, as no range is chosen by gauss or laplace")


def refuse_given(config: Config, sections: Sequence[str], reason: str) -> None:
    """Raise a ConfigError if any option of some sections has another value than its default."""
    for section in sections:
        values = getattr(config, section)
        for name, default, described in options_of(type(values)):
            if getattr(values, name) != default:
                raise ConfigError(f"{described.flags[0]}: {reason}, or leave it out")


def with_settings_of_layers(
    config: QuantizeConfig, names: Sequence[str], found: Mapping[str, Mapping[str, Any]]
) -> QuantizeConfig:
    """The settings with what a search found for single layers; clip modes elsewhere are `none`.

    Args:
        config: what the search started from.
        names: all layers, in order.
        found: by layer, settings of an override.
    """
    own = own_settings(config, names)
    overrides = {
        name: {**_without_clipping(own.get(name, {})), **found.get(name, {})}
        for name in names
        if name in own or name in found
    }
    unset: dict[str, Any] = dict.fromkeys(_OF_MODES)
    return replace(
        config, overrides=overrides, clip_activations="none", stats_file=None, stats_as_is=False, **unset
    )


def without_weight_clipping(config: QuantizeConfig) -> QuantizeConfig:
    """The settings with the ranges of all weights by their smallest and largest value."""
    unset: dict[str, Any] = {
        "also_clip_weights": False,
        "clip_weights": "none",
        "clip_percentile_weights": None,
    }
    overrides = {
        pattern: {key: value for key, value in own.items() if key not in unset}
        for pattern, own in config.overrides.items()
    }
    return replace(config, overrides=overrides, **unset)


# Settings of the clip modes of activations.
_OF_MODES = ("clip_n_stds", "clip_percentile", "clip_outlier_prob")


def _without_clipping(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _OF_MODES}
    return kept | ({"clip_activations": "none"} if "clip_activations" in kept else {})
