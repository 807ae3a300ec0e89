"""Clip modes and their settings: which of them fit together, and what the core makes of them."""

from __future__ import annotations

from collections.abc import Callable

from qtool.config.sections import QuantizeConfig
from qtool.errors import ConfigError
from qtool.numerics.spec import (
    ACIQ_MAX_BITS,
    ACIQ_MODES,
    DEFAULT_OUTLIER_PROB,
    DEFAULT_PERCENTILE,
    LIVE_CLIP_MODES,
    SETTING_OF_MODE,
    ClipSpec,
)

# What `auto` takes, by the measurements in benchmarks/estimators.md: the smallest squared error, which has
# the best logits at 8 bits too, and does not hang on the few largest values of a sample as percentiles
# near 100 do. Weights of 8 bits and more keep their extremes.
AUTO, AUTO_MODE, AUTO_OF_WEIGHTS = "auto", "mse", "l4"
FEW_BITS = 7


def _is_used(settings: QuantizeConfig, setting: str) -> bool:
    """Whether a layer's output, or one of its inputs, is clipped by a mode that reads the setting."""
    modes = {settings.clip_activations}
    modes.update(str(given.get("clip_activations")) for given in settings.input_overrides.values())
    return any(SETTING_OF_MODE.get(mode) == setting for mode in modes)


# As layers.MODIFIERS: key -> its flag, whether it has an effect, and why it has none.
CLIP_MODIFIERS: dict[str, tuple[str, Callable[[QuantizeConfig], bool], str]] = {
    "clip_n_stds": (
        "--qe-clip-n-stds",
        lambda s: _is_used(s, "n_stds"),
        "with clip mode {clip_activations}; add '--qe-clip-acts n_std'",
    ),
    "clip_percentile": (
        "--qe-clip-percentile",
        lambda s: _is_used(s, "percentile"),
        "with clip mode {clip_activations}; add '--qe-clip-acts percentile'",
    ),
    "clip_outlier_prob": (
        "--qe-clip-outlier-prob",
        lambda s: _is_used(s, "outlier_prob"),
        "with clip mode {clip_activations}; add '--qe-clip-acts quantile'",
    ),
    "clip_percentile_weights": (
        "--qe-clip-percentile-wts",
        lambda s: s.clip_weights == "percentile",
        "with clip mode {clip_weights}; add '--qe-clip-wts percentile'",
    ),
    "clip_weights": ("--qe-clip-wts", lambda s: bool(s.bits_weights), "with --qe-bits-wts 0; leave that out"),
}


def check_clipping(where: str, settings: QuantizeConfig) -> None:
    """Refuse clip modes that the other settings of a layer rule out.

    Args:
        where: what the message starts with.
        settings: of one layer.

    Raises:
        ConfigError: naming the flag.
    """
    clip = settings.clip_activations
    if clip == "n_std" and settings.clip_n_stds is None:
        raise ConfigError(f"{where}--qe-clip-acts n_std: needs --qe-clip-n-stds, such as 3")
    if clip in ACIQ_MODES and settings.bits_activations > ACIQ_MAX_BITS:
        raise ConfigError(
            f"{where}--qe-clip-acts {clip}: has published constants for up to {ACIQ_MAX_BITS} bits, found "
            f"{settings.bits_activations}; choose another clip mode"
        )
    if settings.dynamic and clip not in (*LIVE_CLIP_MODES, AUTO):
        raise ConfigError(
            f"{where}--qe-clip-acts {clip}: reads what calibration measured, and --qe-dynamic does without; "
            f"choose one of {', '.join(LIVE_CLIP_MODES)}"
        )
    _check_weights(where, settings)


def _check_weights(where: str, settings: QuantizeConfig) -> None:
    also, own = settings.also_clip_weights, settings.clip_weights
    if also and own != "none":
        raise ConfigError(f"{where}--qe-clip-wts: also_clip_weights chooses the same ranges; drop one")
    if also and settings.clip_activations not in LIVE_CLIP_MODES:
        raise ConfigError(
            f"{where}also_clip_weights: clip mode {settings.clip_activations} is of activations only; "
            "leave it out, or give --qe-clip-wts instead"
        )
    clips = own != "none" or (also and settings.clip_activations != "none")
    if clips and settings.weight_range_factors is not None:
        chooser = "also_clip_weights" if also else "--qe-clip-wts"
        raise ConfigError(f"{where}weight_range_factors: {chooser} chooses the same ranges; drop one")


def clip_of_activations(settings: QuantizeConfig, half_range: bool = False) -> ClipSpec:
    """How the range of a layer's outputs, or of an input, is chosen."""
    mode, percentile = settings.clip_activations, settings.clip_percentile
    outlier_prob = settings.clip_outlier_prob
    return ClipSpec(
        AUTO_MODE if mode == AUTO else mode,
        settings.clip_n_stds,
        half_range,
        settings.clip_to_observed,
        DEFAULT_PERCENTILE if percentile is None else percentile,
        DEFAULT_OUTLIER_PROB if outlier_prob is None else outlier_prob,
    )


def clip_of_weights(settings: QuantizeConfig) -> ClipSpec | None:
    """How the range of a layer's weights is chosen; None is by their smallest and largest value."""
    if settings.also_clip_weights:
        return clip_of_activations(settings)
    mode, percentile = settings.clip_weights, settings.clip_percentile_weights
    if mode == AUTO:
        mode = AUTO_OF_WEIGHTS if 0 < settings.bits_weights <= FEW_BITS else "none"
    if mode == "none":
        return None
    return ClipSpec(mode, percentile=DEFAULT_PERCENTILE if percentile is None else percentile)
