"""Distiller's spellings of keys and values, and the form of its YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTIZER_CLASS = "PostTrainLinearQuantizer"

KEYS = {
    "bits_parameters": "bits_weights",
    "clip_acts": "clip_activations",
    "per_channel_wts": "per_channel_weights",
    "scale_approx_mult_bits": "scale_approx_bits",
    "model_activation_stats": "stats_file",
}
MODES = {
    "SYMMETRIC": "sym",
    "SYMMETRIC_RESTRICTED": "sym_restr",
    "ASYMMETRIC_UNSIGNED": "asym_u",
    "ASYMMETRIC_SIGNED": "asym_s",
}
MODE_KEYS = ("mode", "mode_activations", "mode_weights")
BITS_KEYS = ("bits_activations", "bits_weights")
# Spellings of an older Distiller, which it refuses itself.
OLD_KEYS = {"acts": "bits_activations", "wts": "bits_weights", "bias": "bits_accum"}
# Distiller takes it in an override and makes no use of it: a bias is as wide as the accumulator.
WITHOUT_EFFECT = "bits_bias"


def as_settings(key: str, value: Any) -> list[tuple[str, Any]]:
    """One key and value of a file as qtool's own settings; those of qtool stay as they are.

    Example:
        >>> as_settings("mode", {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"})
        [('mode_activations', 'asym_u'), ('mode_weights', 'sym')]
        >>> as_settings("clip_acts", "NONE"), as_settings("bits_parameters", None)
        ([('clip_activations', 'none')], [('bits_weights', 0)])
    """
    name = KEYS.get(key, key)
    if name == "mode" and isinstance(value, Mapping):
        if set(value) != {"activations", "weights"}:
            return [("mode", value)]
        return [(f"mode_{part}", _mode(value[part])) for part in ("activations", "weights")]
    if name == "fp16":
        return [("fpq_module", 16 if value is True else None if value in (False, None) else value)]
    if name in MODE_KEYS:
        return [(name, _mode(value))]
    if name == "clip_activations" and isinstance(value, str):
        return [(name, value.lower())]
    # Null bits mean "do not quantize"; absent ones, "as everywhere".
    return [(name, 0 if value is None and name in BITS_KEYS else value)]


def _mode(value: Any) -> Any:
    return MODES.get(value, value) if isinstance(value, str) else value


def find_quantizer(tree: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """The first component of Distiller's quantizer class in any section: its place and its settings."""
    for section, body in tree.items():
        if isinstance(body, Mapping):
            for instance, settings in body.items():
                if isinstance(settings, Mapping) and settings.get("class") == QUANTIZER_CLASS:
                    return (str(section), str(instance)), settings
    return None
