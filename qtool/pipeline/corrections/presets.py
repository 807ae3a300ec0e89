"""What a preset stands for: corrections and estimators that fit a network and its bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from qtool.algorithms.weight_correction import PROJECTION
from qtool.config import CorrectionConfig, QuantizeConfig
from qtool.config.clipping import AUTO
from qtool.graph.neighbours import following_op
from qtool.graph.ops import MAX_POOLS
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import LayerSpec

FAST, ACCURATE, BEST = "fast", "accurate", "best"


OF_PRESET = {
    FAST: ("fast_bias_correction",),
    ACCURATE: ("weight_correction", "bias_correction"),
    BEST: ("gptq", "bias_correction"),
}
# With so few bits of activations all presets fuse sums, and GPTQ's own biases can be better than equal means.
FEW_BITS = 5
SETTINGS: dict[str, dict[str, Any]] = {"weight_correction": {"factor": PROJECTION}}
SUMS = {
    "inputs": "each summand is rounded at the scale of the sum",
    "sum": "sums are rounded once",
    "fused": "sums are rounded once, and the convolution in front of one is not rounded before",
    "none": "sums are not rounded",
}
WORDS = {
    "fast_bias_correction": "fast bias correction: the mean error of the weights",
    "weight_correction": "weight correction: means of channels, and errors orthogonal to the weights",
    "bias_correction": "bias correction, layer after layer: the mean error where values are read",
    "gptq": "GPTQ: the integers of weights by the error of each layer's output",
}


@dataclass(frozen=True)
class Traits:
    """What a preset looks at.

    Args:
        weight_bits, activation_bits: the fewest of any layer; None where all stay in float.
        per_tensor: whether any weight has one grid for all its channels.
        attention: whether there are attentions or layer norms.
        linked: whether a convolution with a batch norm goes into one other alone, a ReLU or ReLU6 between.
        pools: whether there are max pools.
    """

    weight_bits: int | None
    activation_bits: int | None
    per_tensor: bool
    attention: bool
    linked: bool
    pools: bool


@dataclass(frozen=True)
class Choice:
    """What a preset chose.

    Args:
        quantizers: the settings of the quantizer, estimators included.
        methods: the corrections, in order.
        words: what was chosen and why, a line each.
    """

    quantizers: QuantizeConfig
    methods: tuple[CorrectionConfig, ...]
    words: tuple[str, ...]


def traits_of(traced: fx.GraphModule, specs: dict[str, LayerSpec]) -> Traits:
    """What a preset looks at; batch norms of traced are not folded yet."""
    ops = {node.meta["op"] for _, node, _ in layers(traced)}
    weights = [s.weight for s in specs.values() if s.weight is not None]
    outputs = [s.output for s in specs.values() if s.output is not None]
    return Traits(
        min((w.num_bits for w in weights), default=None),
        min((o.num_bits for o in outputs), default=None),
        any(w.axis is None for w in weights),
        not ops.isdisjoint({"softmax", "layer_norm", "scaled_dot_product_attention"}),
        any(_is_linked(node) for _, node, _ in layers(traced)),
        not ops.isdisjoint(MAX_POOLS),
    )


def _is_linked(node: fx.Node) -> bool:
    """Whether a batch norm's output goes into one convolution alone, through an activation at most."""
    if node.meta["op"] != "batch_norm" or tensor_inputs(node)[0].meta.get("op") != "conv":
        return False
    following = following_op(node)
    while following is not None and following[0] in ("relu", "relu6"):
        following = following_op(following[1])
    return following is not None and following[0] == "conv"


def choose(preset: str, quantizers: QuantizeConfig, traits: Traits) -> Choice:
    """What a preset stands for here.

    Bits, modes and granularity stay as they were asked for; so do an estimator, and roundings of sums and max
    pools, that were chosen. Where Distiller rounds and kernels need not, at the summands of an addition,
    behind max pools and at the output, it is left out.
    """
    words: list[str] = []
    methods: list[CorrectionConfig] = []
    quantizers = _exact(preset, _estimators(quantizers, words), traits, words)
    _equalization(traits, methods, words)
    if traits.weight_bits is None:
        words.append("weights stay in float, and with them their biases")
    else:
        for name in OF_PRESET[preset]:
            settings, more = _settings(preset, name, traits.weight_bits, traits)
            methods.append(_method(name, **settings))
            words.append(WORDS[name] + more)
    return Choice(quantizers, tuple(methods), tuple(words))


def _settings(preset: str, name: str, weight_bits: int, traits: Traits) -> tuple[dict[str, Any], str]:
    """The settings of a method, and what is to be said of them."""
    activation_bits = traits.activation_bits or 32
    if preset == BEST and name == "bias_correction" and activation_bits <= FEW_BITS:
        return {"only_if_better": True}, ", unless the network's outputs lose by it"
    if name == "gptq":
        # With as many bits for activations their errors are the larger ones, and other steps give no more.
        searched = weight_bits < activation_bits
        where = " where each channel has one" if traits.per_tensor else ""
        return {"search_scales": searched}, ", with their scales" + where if searched else ""
    return SETTINGS.get(name, {}), ""


def _estimators(quantizers: QuantizeConfig, words: list[str]) -> QuantizeConfig:
    """Ranges by the number of bits; those that were chosen stay."""
    if quantizers.clip_weights == "none" and not quantizers.also_clip_weights:
        quantizers = replace(quantizers, clip_weights=AUTO)
    if quantizers.clip_activations == "none":
        quantizers = replace(quantizers, clip_activations=AUTO)
        words.append("ranges by mse; those of weights by l4, with 8 bits or more by their extremes")
    return quantizers


def _exact(preset: str, quantizers: QuantizeConfig, traits: Traits, words: list[str]) -> QuantizeConfig:
    """No rounding that kernels do not need."""
    if traits.activation_bits is None:
        return quantizers
    fused = preset == BEST or traits.activation_bits <= FEW_BITS
    sums = quantizers.add_rounding or ("fused" if fused else "sum")
    words.append(f"{SUMS[sums]}; what the network gives is not rounded at all")
    pools = quantizers.max_pool_grid or "input"
    if traits.pools and pools == "input":
        words.append("max pools hand on what they read, with its bits")
    return replace(quantizers, add_rounding=sums, max_pool_grid=pools, float_output=True)


def _equalization(traits: Traits, methods: list[CorrectionConfig], words: list[str]) -> None:
    if traits.attention:
        words.append("no equalization across layers: attention and layer norms stand between them")
    elif not traits.linked:
        words.append("no equalization: no convolution with a batch norm goes into one other alone")
    elif traits.per_tensor:
        methods.append(_method("equalization", by="weights"))
        words.append("equalization of weights: they have one grid per tensor")


def _method(name: str, **settings: Any) -> CorrectionConfig:
    return CorrectionConfig(name, settings)
