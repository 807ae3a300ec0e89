"""What may be tuned of a network, and the settings of a run that does one candidate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from qtool.config import Config, QuantizeConfig, own_settings
from qtool.config.sections.tuning import FLOAT as FLOAT_WORD
from qtool.config.sections.tuning import TuningConfig
from qtool.errors import ConfigError
from qtool.graph.ends import first_and_last
from qtool.graph.trace import layers
from qtool.pipeline.first_last import WITH_WEIGHTS
from qtool.quantizers.plan import ModelPlan
from qtool.search.groups import quantizer_groups
from qtool.search.space import FLOAT, Candidate, Dimension, Space

# Names of dimensions that are no fields of the quantizer's settings.
ENDS, PRESET = "ends", "preset"
FEWER = 8
CLIP_MODIFIERS = ("clip_n_stds", "clip_percentile", "clip_outlier_prob")


@dataclass(frozen=True)
class TuningSpace:
    """What may be tuned, and what it means for the layers.

    Args:
        space: as strategies see it.
        groups: the layers of each group.
        ends: the first and the last layers with weights.
        names: all layers, in order.
    """

    space: Space
    groups: Mapping[str, tuple[str, ...]]
    ends: tuple[str, ...]
    names: tuple[str, ...]


def tuning_space(
    config: Config, traced: fx.GraphModule, folded: fx.GraphModule, plan: ModelPlan
) -> TuningSpace:
    """The space of a run.

    Args:
        config: where the tuning starts.
        traced: the float network.
        folded: the same, batch norms folded.
        plan: of folded, as config asks for it.
    """
    tuned = config.tuning.tuned
    first, last = first_and_last(folded, WITH_WEIGHTS)
    groups = {g.name: g.layers for g in quantizer_groups(folded, plan)} if "groups" in tuned else {}
    found = Space(
        tuple(d for d in _dimensions(config, tuned) if len(d.options) > 1),
        tuple(groups),
        fallback(config.tuning, config.quantizers) if groups else (),
    )
    names = tuple(name for name, _, _ in layers(traced))
    return TuningSpace(found, groups, tuple(dict.fromkeys([*first, *last])), names)


def check_space(config: Config) -> None:
    """Find out before any long work that nothing is left to be tuned.

    Raises:
        ConfigError: naming the flag.
    """
    tuned = config.tuning.tuned
    if not _bits(config.quantizers):
        raise ConfigError(
            "--qe-bits-wts 0 and --qe-bits-acts 0 leave nothing to be tuned; give one of them bits"
        )
    if "groups" in tuned:
        fallback(config.tuning, config.quantizers)
    elif config.tuning.fallback_bits:
        raise ConfigError("--fallback: is of single groups; add groups to --tuned, or leave it out")
    elif all(len(d.options) == 1 for d in _dimensions(config, tuned)):
        raise ConfigError(f"--tuned {','.join(tuned)}: leaves nothing to be tuned here; name more")


def fallback(tuning: TuningConfig, quantizers: QuantizeConfig) -> tuple[int, ...]:
    """The bits that groups may fall back to, in order; 0 for float.

    Raises:
        ConfigError: if it is no more than they have.
    """
    fewest = min(_bits(quantizers), default=FEWER)
    if not tuning.fallback_bits:
        return (FEWER, FLOAT) if fewest < FEWER else (FLOAT,)
    found = tuple(FLOAT if word == FLOAT_WORD else int(word) for word in tuning.fallback_bits)
    for bits in found:
        if bits != FLOAT and bits <= fewest:
            raise ConfigError(
                f"--fallback {bits}: weights and activations have {fewest} bits at least; ask for more"
            )
    return found


def _bits(quantizers: QuantizeConfig) -> list[int]:
    return [bits for bits in (quantizers.bits_weights, quantizers.bits_activations) if bits]


def _dimensions(config: Config, tuned: Sequence[str]) -> Iterable[Dimension]:
    """In Neural Compressor's order: scheme and algorithm of activations, then of weights, then recipes."""
    asked = config.quantizers
    few = min(_bits(asked), default=FEWER) < FEWER
    activations, weights = bool(asked.bits_activations), bool(asked.bits_weights)
    if "modes" in tuned and activations:
        yield _dimension("mode_activations", asked.mode_activations or asked.mode, "asym_u", "sym")
    if "estimators" in tuned and activations:
        yield _dimension("clip_activations", asked.clip_activations, "mse", "kl")
    if "modes" in tuned and weights:
        yield _dimension("mode_weights", asked.mode_weights or asked.mode, "sym")
    if "estimators" in tuned and weights and not asked.also_clip_weights:
        yield _dimension("clip_weights", asked.clip_weights, "mse")
    if "granularity" in tuned and weights:
        yield _dimension("per_channel_weights", asked.per_channel_weights, True)
    if "ends" in tuned and asked.first_last_bits is None:
        yield _dimension(ENDS, None, FEWER if few else FLOAT, recipe=True)
    if "corrections" in tuned and weights and not config.corrections.methods:
        yield _dimension(PRESET, config.corrections.preset or "none", "fast", "accurate", recipe=True)


def _dimension(name: str, start: Any, *others: Any, recipe: bool = False) -> Dimension:
    return Dimension(name, (start, *(other for other in others if other != start)), recipe)


def config_of(config: Config, candidate: Candidate, space: TuningSpace) -> Config:
    """The settings of a run of `qtool quantize` that does a candidate."""
    settings = dict(candidate.settings)
    ends, preset = settings.pop(ENDS, None), settings.pop(PRESET, None)
    quantizers = config.quantizers
    if settings.get("clip_activations", quantizers.clip_activations) != quantizers.clip_activations:
        settings |= dict.fromkeys(CLIP_MODIFIERS) | {"clip_to_observed": False}
    if settings.get("clip_weights", quantizers.clip_weights) != quantizers.clip_weights:
        settings["clip_percentile_weights"] = None
    quantizers = replace(quantizers, **settings)
    in_float = [layer for g, bits in candidate.raised if bits == FLOAT for layer in space.groups[g]]
    if ends == FLOAT:
        in_float += [layer for layer in space.ends if layer not in in_float]
    elif ends is not None:
        quantizers = replace(quantizers, first_last_bits=ends)
    raised = {layer: bits for g, bits in candidate.raised if bits != FLOAT for layer in space.groups[g]}
    quantizers = _with_raised(quantizers, raised, space.names)
    quantizers = replace(quantizers, no_quant_layers=(*quantizers.no_quant_layers, *in_float))
    corrections = config.corrections
    if preset is not None and not corrections.methods:
        corrections = replace(corrections, preset=preset)
        if not corrections.asked:
            corrections = replace(corrections, images=type(corrections).images)
    return replace(config, quantizers=quantizers, corrections=corrections, tuning=TuningConfig())


def _with_raised(
    quantizers: QuantizeConfig, raised: Mapping[str, int], names: Sequence[str]
) -> QuantizeConfig:
    """The settings with more bits for some layers, as overrides by their very names."""
    if not raised:
        return quantizers
    own = own_settings(quantizers, names)
    overrides = dict(quantizers.overrides)
    for layer, bits in raised.items():
        settings = dict(own.get(layer, {}))
        for key in ("bits_weights", "bits_activations"):
            held = settings.get(key, getattr(quantizers, key))
            if held:
                settings[key] = max(held, bits)
        overrides[layer] = settings
    return replace(quantizers, overrides=overrides)
