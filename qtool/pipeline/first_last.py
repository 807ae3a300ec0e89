"""Settings of their own for the two ends of a network, where few bits cost the most accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from qtool.errors import ConfigError
from qtool.graph.ends import feeding, first_and_last
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import layers
from qtool.numerics.spec import LayerSpec, QuantSpec
from qtool.quantizers.plan import WEIGHTED

WITH_WEIGHTS = WEIGHTED | {"embedding"}


def with_first_last_bits(
    traced: fx.GraphModule,
    specs: Mapping[str, LayerSpec],
    bits: int,
    own: Mapping[str, Mapping[str, Any]],
) -> dict[str, LayerSpec]:
    """The specs with other bits for the first and the last layers with weights.

    Their weights, inputs and outputs get so many bits. An input that another layer gives, such as the
    pooling in front of a classifier, has them when that layer's output has, so that gets them too. What
    is in float stays there.

    Args:
        traced: the network.
        specs: what is asked, by layer name.
        bits: 2 to 16.
        own: the settings of each layer's override, by layer name; what it sets itself wins.

    Raises:
        ConfigError: if no layer has weights.

    Reference:
        The 4-bit results of AdaRound, BRECQ and QDrop all leave both ends at 8 bits.
    """
    folded = fold_batch_norms(traced).traced
    first, last = first_and_last(folded, WITH_WEIGHTS)
    if not first:
        raise ConfigError("--first-last-bits: the network has no layer with weights; leave it out")
    ends = dict.fromkeys([*first, *last])
    nodes = {name: node for name, node, _ in layers(folded)}
    read = {source for name in ends for source in feeding(nodes[name])}
    found = dict(specs)
    for name in read - ends.keys():
        found[name] = _with_output(specs[name], bits, own.get(name, {}))
    for name in ends:
        found[name] = _with_all(specs[name], bits, own.get(name, {}))
    return found


def _with_all(spec: LayerSpec, bits: int, own: Mapping[str, Any]) -> LayerSpec:
    """What is asked of a layer, with other bits for its weights, its inputs and its output."""
    if spec.weight is not None and "bits_weights" not in own:
        spec = replace(spec, weight=replace(spec.weight, num_bits=bits))
    if spec.output is None or "bits_activations" in own:
        return spec
    given = own.get("input_overrides", {})
    inputs = {
        index: one if "bits_activations" in given.get(index, {}) else replace(one, grid=_wide(one.grid, bits))
        for index, one in spec.inputs.items()
    }
    return replace(spec, output=_wide(spec.output, bits), inputs=inputs)


def _with_output(spec: LayerSpec, bits: int, own: Mapping[str, Any]) -> LayerSpec:
    """What is asked of a layer, with other bits for its output alone."""
    if spec.output is None or spec.output.num_bits == bits or "bits_activations" in own:
        return spec
    return replace(spec, output=_wide(spec.output, bits), input=spec.input or spec.output)


def _wide(grid: QuantSpec, bits: int) -> QuantSpec:
    return replace(grid, num_bits=bits)
