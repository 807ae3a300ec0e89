"""What is asked of the grids of a layer's inputs and output, given the network around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from torch import fx

from qtool.errors import ConfigError
from qtool.graph.signs import never_negative
from qtool.graph.trace import is_mask, tensor_inputs
from qtool.numerics.spec import InputSpec, LayerSpec, QuantSpec


def asked_of_inputs(
    name: str,
    node: fx.Node,
    spec: LayerSpec,
    on_grid: Sequence[bool],
    never_negative: Set[fx.Node],
) -> tuple[InputSpec | None, ...]:
    """What is asked of each input that arrives in float; None for one on a grid, and for one taken as it is.

    Args:
        name, node: the layer.
        spec: what is asked of it; it has a grid for inputs or for the output.
        on_grid: for each tensor input, whether the layer in front of it has put it on a grid.
        never_negative: from find_never_negative.

    Raises:
        ConfigError: if an input has an entry of its own and no use for it, or needs one and has none.
    """
    grid = spec.input or spec.output
    assert grid is not None
    beyond = [i for i in spec.inputs if i >= len(on_grid)]
    if beyond:
        raise ConfigError(
            f"layer {name!r}: input_overrides.{beyond[0]}: it has {len(on_grid)} inputs, counted from 0"
        )
    # What the output's clamp cuts off says nothing about the input: full range here.
    default = InputSpec(grid, replace(spec.clip, half_range=False))
    found: list[InputSpec | None] = []
    for index, arrives_on_grid in enumerate(on_grid):
        what = f"input {index} of layer {name!r}"
        if is_mask(node, index) or index == spec.carried:
            found.append(None)
        elif arrives_on_grid and index in spec.inputs:
            raise ConfigError(
                f"{what}: arrives quantized by the layer in front of it, and has an entry in "
                "input_overrides; remove that, or leave the layer in front in float"
            )
        elif not arrives_on_grid and index not in spec.inputs and not spec.input_fallback:
            raise ConfigError(
                f"{what}: arrives in float; quantize the layer in front of it, give the input an entry in "
                "input_overrides, or set inputs_quant_auto_fallback to true"
            )
        else:
            found.append(None if arrives_on_grid else spec.inputs.get(index, default))
    sources = tensor_inputs(node)
    return tuple(
        None if one is None else replace(one, grid=_fitting(one.grid, spec, sources[index] in never_negative))
        for index, one in enumerate(found)
    )


def asked_of_output(node: fx.Node, spec: LayerSpec, never_negative: Set[fx.Node]) -> QuantSpec:
    """The grid that is asked of a layer's output; arguments as for asked_of_inputs."""
    assert spec.output is not None
    return _fitting(spec.output, spec, node in never_negative)


def _fitting(grid: QuantSpec, spec: LayerSpec, never_negative: bool) -> QuantSpec:
    return grid.unsigned() if spec.symmetric_unsigned and never_negative else grid


def find_never_negative(
    traced: fx.GraphModule,
    specs: Mapping[str, LayerSpec],
    quantized: Set[str],
    fused: Mapping[str, tuple[str, str]],
) -> frozenset[fx.Node]:
    """The nodes whose values can never be negative; none if no layer asks for unsigned grids.

    Args:
        traced, specs: as for plan_model.
        quantized: names of the layers whose output is quantized.
        fused: the activations that they take over.
    """
    if not any(spec.symmetric_unsigned for spec in specs.values()):
        return frozenset()
    computed = {activation for activation, _ in fused.values()}
    rectified = {name for name in quantized if name in fused or specs[name].clip.half_range}
    left_out = {name for name, spec in specs.items() if spec.identity and name not in computed}
    return never_negative(traced, rectified, left_out)
