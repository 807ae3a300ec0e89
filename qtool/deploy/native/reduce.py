"""Seven bits for activations where eight could saturate on processors without VNNI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from qtool.deploy.native.containers import Container, clamp_of, container_for
from qtool.deploy.native.rules import INTEGER_RULES
from qtool.deploy.native.saturation import SAFE_BITS, saturating_channels
from qtool.deploy.native.weights import kernel_integers
from qtool.graph.neighbours import source_of
from qtool.graph.trace import layers, tensor_inputs
from qtool.numerics.spec import InputSpec, LayerSpec
from qtool.quantizers.grids import Quantize
from qtool.quantizers.prepare import QuantizedModel
from qtool.quantizers.weighted import QuantWeighted


def reduce_ranges(
    model: QuantizedModel, specs: Mapping[str, LayerSpec]
) -> tuple[dict[str, LayerSpec], list[str]]:
    """What to ask for, so that no sum of two products exceeds 16 bits.

    Args:
        model: quantized as specs ask, with static ranges.
        specs: by layer name.

    Returns:
        The specs with 7 bits for the outputs and inputs that need it, and the names of those in words.
    """
    reduced = dict(specs)
    words = []
    for name, node, module in layers(model.network):
        plan = model.plan.layers[name]
        if not isinstance(module, QuantWeighted) or plan.op not in INTEGER_RULES or plan.weight is None:
            continue
        source = source_of(tensor_inputs(node)[0])
        container = _container(source, model)
        if container is None or plan.weight.spec.num_bits > 8:
            continue
        if not bool(saturating_channels(kernel_integers(plan)[0], container.high).any()):
            continue
        if "layer" in source.meta:
            producer = source.meta["layer"]
            reduced[producer] = _with_output_of(reduced[producer], SAFE_BITS)
            words.append(f"the output of {producer}")
        else:
            reduced[name] = _with_input_of(reduced[name], SAFE_BITS)
            words.append(f"the input of {name}")
    return reduced, list(dict.fromkeys(words))


def _container(node: fx.Node, model: QuantizedModel) -> Container | None:
    if "layer" not in node.meta:
        border = model.network.get_submodule(str(node.target))
        assert isinstance(border, Quantize)
        return container_for(border.qparams)
    plan = model.plan.layers[node.meta["layer"]]
    assert plan.output is not None
    return container_for(plan.output, clamp_of(plan), plan.activation_limit)


def _with_output_of(spec: LayerSpec, num_bits: int) -> LayerSpec:
    """Also for its inputs that arrive in float and have no settings of their own."""
    assert spec.output is not None
    return replace(spec, output=replace(spec.output, num_bits=num_bits))


def _with_input_of(spec: LayerSpec, num_bits: int) -> LayerSpec:
    """Of its first input: the activations of a convolution or linear layer."""
    assert spec.output is not None
    asked = spec.inputs.get(0, InputSpec(spec.output, replace(spec.clip, half_range=False)))
    reduced = replace(asked, grid=replace(asked.grid, num_bits=num_bits))
    return replace(spec, inputs={**spec.inputs, 0: reduced})
