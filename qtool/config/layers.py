"""Config -> LayerSpecs: which settings hold for which layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtool.config.clipping import (
    CLIP_MODIFIERS,
    check_clipping,
    clip_of_activations,
    clip_of_weights,
)
from qtool.config.sections import QuantizeConfig
from qtool.errors import ConfigError, nearest
from qtool.numerics.spec import InputSpec, LayerSpec, QuantSpec


def split_patterns(values: Sequence[str]) -> list[str]:
    """Patterns from repeated flags, each of which may hold several separated by commas.

    A comma inside braces or brackets belongs to its regular expression.

    Example:
        >>> split_patterns(["fc,conv1", "layer[1,2].*", "a{1,2}"])
        ['fc', 'conv1', 'layer[1,2].*', 'a{1,2}']
    """
    return [p.strip() for value in values for p in re.split(r",(?![^{]*\})(?![^\[]*\])", value) if p.strip()]


def matching(
    pattern: str, names: Sequence[str], advice: str = "'qtool layers' lists their names"
) -> list[str]:
    """The names that a pattern matches as a whole.

    A pattern is a layer's name or a regular expression.

    Args:
        pattern: what is looked for.
        names: of layers.
        advice: how to see them, for the message.

    Raises:
        ConfigError: if it is no valid expression, or matches nothing.
    """
    if pattern in names:
        return [pattern]
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {pattern!r}: not a regular expression: {error}") from error
    found = [name for name in names if expression.fullmatch(name)]
    if not found:
        raise ConfigError(f"pattern {pattern!r}: matches no layer{nearest(pattern, names)}; {advice}")
    return found


def check(config: QuantizeConfig) -> None:
    """Refuse settings that contradict each other, before anything runs.

    Raises:
        ConfigError: naming the flag.
    """
    if config.dynamic and config.stats_file is not None:
        raise ConfigError("--qe-dynamic: takes no --qe-stats-file; its ranges are those of each batch")
    if config.per_sample and not config.dynamic:
        raise ConfigError("--per-sample: has an effect with --qe-dynamic only; add that, or leave it out")
    if config.stats_as_is and config.stats_file is None:
        raise ConfigError(
            "--qe-stats-as-is: has an effect with --qe-stats-file only; add that, or leave it out"
        )
    if config.dynamic and config.add_rounding not in (None, "inputs"):
        raise ConfigError("--qe-add-rounding: with --qe-dynamic additions are made in float; leave it out")
    if config.add_rounding not in (None, "inputs") and not config.bits_activations:
        raise ConfigError("--qe-add-rounding: has no effect with --qe-bits-acts 0; leave it out")
    if config.max_pool_grid == "input" and (config.dynamic or not config.bits_activations):
        without = "--qe-dynamic" if config.dynamic else "--qe-bits-acts 0"
        raise ConfigError(f"--qe-max-pool-grid: has no effect with {without}; leave it out")
    if config.float_output and (config.dynamic or not config.bits_activations):
        without = "--qe-dynamic" if config.dynamic else "--qe-bits-acts 0"
        raise ConfigError(f"--qe-float-output: has no effect with {without}; leave it out")
    variants = [("", config), *_at_the_ends(config)]
    variants += [(f"overrides.{p}: ", replace(config, **s)) for p, s in config.overrides.items()]
    for where, settings in variants:
        _check_settings(where, settings)
    for where, settings in variants:
        for index, given in settings.input_overrides.items():
            _check_input(f"{where.removesuffix(': ')}.input_overrides.{index}: ", settings, given)
    for key in MODIFIERS:
        _check_effect(key, config, variants)


def _at_the_ends(config: QuantizeConfig) -> list[tuple[str, QuantizeConfig]]:
    """The settings of the first and the last layer, where they are others."""
    bits = config.first_last_bits
    if bits is None:
        return []
    on_grids = [key for key in ("bits_weights", "bits_activations") if getattr(config, key)]
    if not on_grids:
        raise ConfigError(
            "--first-last-bits: has no effect with --qe-bits-wts 0 and --qe-bits-acts 0, which leave all "
            "layers in float; leave it out"
        )
    at_ends: dict[str, Any] = dict.fromkeys(on_grids, bits)
    return [("--first-last-bits: ", replace(config, **at_ends))]


# A setting that changes how another one works -> its flag, whether it has an effect, and why it has none.
MODIFIERS: dict[str, tuple[str, Callable[[QuantizeConfig], bool], str]] = {
    **CLIP_MODIFIERS,
    "scale_approx_everywhere": (
        "--qe-scale-approx-everywhere",
        lambda s: s.scale_approx_bits is not None,
        "on exact scales; add --qe-scale-approx-bits",
    ),
    "symmetric_unsigned": (
        "--qe-sym-unsigned",
        lambda s: bool(s.bits_activations) and (s.mode_activations or s.mode).startswith("sym"),
        "on asymmetric or float activations; choose mode sym or sym_restr for them",
    ),
}


def _check_effect(key: str, config: QuantizeConfig, variants: Sequence[tuple[str, QuantizeConfig]]) -> None:
    """Refuse a setting for all layers that has an effect on none, and one of an override that has none."""
    flag, has_effect, why_none = MODIFIERS[key]
    given = [("", getattr(config, key))]
    given += [(f"overrides.{p}: ", s[key]) for p, s in config.overrides.items() if key in s]
    for where, value in given:
        users = [settings for place, settings in variants if not where or place == where]
        if value not in (None, False, "none") and not any(has_effect(settings) for settings in users):
            reason = why_none.format_map(vars(users[0]))
            raise ConfigError(f"{where}{flag}: has no effect {reason}, or leave it out")


def _check_settings(where: str, settings: QuantizeConfig) -> None:
    check_clipping(where, settings)
    given = _pair(settings.output_range)
    if given is not None and given[0] > given[1]:
        raise ConfigError(
            f"{where}output_range: {given[0]:g} is above {given[1]:g}; give the smaller one first"
        )
    if given is not None and settings.bits_activations == 0:
        raise ConfigError(f"{where}output_range: has no effect with bits_activations 0; leave it out")
    factors = _pair(settings.weight_range_factors)
    if factors is not None and min(factors) <= 0:
        raise ConfigError(f"{where}weight_range_factors: {min(factors):g} is not positive")
    if settings.dynamic and given is not None:
        raise ConfigError(f"{where}output_range: with --qe-dynamic, ranges are those of each batch")
    widest = max(settings.bits_activations, settings.bits_weights)
    if settings.bits_accum < widest:
        raise ConfigError(
            f"{where}--qe-bits-accum: {settings.bits_accum} bits are fewer than the {widest} "
            "of the values added up"
        )


def _check_input(where: str, settings: QuantizeConfig, given: Mapping[str, Any]) -> None:
    if settings.bits_activations == 0:
        raise ConfigError(
            f"{where}has no effect, because bits_activations is 0 (null), which leaves the layer's inputs in "
            "float too; remove one of the two"
        )
    merged = _settings_of_input(settings, given)
    if merged.bits_activations == 0:
        raise ConfigError(f"{where}an input needs 2 to 16 bits; found 0, which is float")
    _check_settings(where, merged)


def layer_specs(config: QuantizeConfig, names: Sequence[str]) -> dict[str, LayerSpec]:
    """What is asked of every layer.

    Over the settings for all layers, an override holds whose pattern is the layer's very name, else
    the first whose pattern matches; then no_clip_layers, then no_quant_layers.

    Args:
        config: checked by check.
        names: all layers, in order.

    Raises:
        ConfigError: if a pattern matches nothing; all such patterns are reported together.
    """
    settings = dict.fromkeys(names, config)
    problems: list[str] = []

    def each(where: str, patterns: Sequence[str]) -> list[tuple[str, list[str]]]:
        found = []
        for pattern in patterns:
            try:
                found.append((pattern, matching(pattern, names)))
            except ConfigError as error:
                problems.append(f"{where}: {error}")
        return found

    for name, pattern in overrides_of(each("overrides", _literal_first(config, names))).items():
        settings[name] = replace(config, **config.overrides[pattern])
    for _, matched in each("--qe-no-clip-layers", split_patterns(config.no_clip_layers)):
        settings.update({n: replace(settings[n], clip_activations="none") for n in matched})
    for _, matched in each("--qe-no-quant-layers", split_patterns(config.no_quant_layers)):
        settings.update({n: replace(settings[n], bits_activations=0, bits_weights=0) for n in matched})
    if problems:
        raise ConfigError("\n".join(problems))
    return {name: layer_spec(s) for name, s in settings.items()}


def _literal_first(config: QuantizeConfig, names: Sequence[str]) -> list[str]:
    """Distiller's files rely on a literal name to win over an expression that stands before it."""
    return sorted(config.overrides, key=lambda pattern: pattern not in names)


def overrides_of(found: Sequence[tuple[str, Sequence[str]]]) -> dict[str, str]:
    """The first pattern that matches each layer, from patterns and the names that they match."""
    return {name: pattern for pattern, matched in reversed(found) for name in matched}


def own_settings(config: QuantizeConfig, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The settings of the override that holds for each layer which has one."""
    found = [(pattern, matching(pattern, names)) for pattern in _literal_first(config, names)]
    return {name: config.overrides[pattern] for name, pattern in overrides_of(found).items()}


def layer_spec(settings: QuantizeConfig) -> LayerSpec:
    """The settings of one layer, as the core understands them."""

    def grid(mode: str | None, bits: int, axis: int | None = None) -> QuantSpec | None:
        return QuantSpec.from_mode(mode or settings.mode, bits, axis) if bits else None

    axis = 0 if settings.per_channel_weights else None
    return LayerSpec(
        weight=grid(settings.mode_weights, settings.bits_weights, axis),
        output=grid(settings.mode_activations, settings.bits_activations),
        inputs=_input_specs(settings) if settings.bits_activations else {},
        input_fallback=settings.inputs_quant_auto_fallback,
        quantize_inputs=settings.quantize_inputs,
        clip=clip_of_activations(settings, settings.clip_half_range),
        weight_clip=clip_of_weights(settings),
        float_bits=settings.fpq_module,
        fake=settings.fake,
        identity=settings.make_identity,
        keep_float_weight=settings.save_fp_weights,
        output_range=_pair(settings.output_range),
        weight_range_factors=_pair(settings.weight_range_factors),
        accum_bits=settings.bits_accum,
        accum_float64=settings.accum_dtype == "float64",
        scale_approx_bits=settings.scale_approx_bits,
        scale_approx_everywhere=settings.scale_approx_everywhere,
        symmetric_unsigned=settings.symmetric_unsigned,
        sum_once=settings.add_rounding in ("sum", "fused"),
    )


def _pair(numbers: Sequence[float] | None) -> tuple[float, float] | None:
    return None if numbers is None else (numbers[0], numbers[1])


def _input_specs(settings: QuantizeConfig) -> dict[int, InputSpec]:
    """What is asked of single inputs of a layer, by number."""
    found = {}
    for index, given in settings.input_overrides.items():
        own = _settings_of_input(settings, given)
        grid = QuantSpec.from_mode(own.mode_activations or own.mode, own.bits_activations)
        found[index] = InputSpec(grid, clip_of_activations(own))
    return found


def _settings_of_input(settings: QuantizeConfig, given: Mapping[str, Any]) -> QuantizeConfig:
    """The settings of one input: those given, over those of the layer's output."""
    own = {k: v for k, v in given.items() if k != "from_output"}
    if "mode" in own:
        own["mode_activations"] = own["mode"]
    return replace(settings, **own)
