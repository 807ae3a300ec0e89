"""A converted layer against the simulated one, on integers all over its grids.

What a kernel of a build of torch gives on a processor is not always what its documentation says:
some saturate, some are wrong for some shapes. So every converted layer is tried out once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.native.containers import Container, make_quantized
from qtool.deploy.native.rules import Site
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.modules import FakeQuantize

# Both networks round once, by multipliers whose last bit may differ: at a tie one goes up, one down.
LARGEST_DIFFERENCE = 1
# Ties are rare, unless a ratio of scales is a short fraction.
SHARE_EQUAL = 0.98
# Results in float, as a share of the largest.
CLOSE = 1e-5


def disagreement(site: Site, native: nn.Module) -> str | None:
    """How the two modules differ on random integers, half of them at the ends of the grids; None if not."""
    generator = torch.Generator().manual_seed(0)
    simulated: dict[fx.Node, Any] = {}
    converted: dict[fx.Node, Any] = {}
    for node, container in dict(zip(tensor_inputs(site.node), site.inputs, strict=True)).items():
        integers = _random_integers(node.meta["value"].shape, container, generator)
        centered = integers.float() - container.zero_point
        on_grid = not isinstance(site.module, FakeQuantize)
        simulated[node] = centered if on_grid else centered * container.scale
        converted[node] = make_quantized(integers, container)
    with torch.no_grad():
        expected = site.module(*_filled(site.node, simulated)[0], **_filled(site.node, simulated)[1])
        result = native(*_filled(site.node, converted)[0], **_filled(site.node, converted)[1])
    steps = (result.int_repr().float() - site.output.zero_point - expected).abs()
    largest, equal = int(steps.max()), float((steps == 0).double().mean())
    if largest <= LARGEST_DIFFERENCE and equal >= SHARE_EQUAL:
        return None
    return f"by up to {largest} steps, in {100 * (1 - equal):.1f} % of values"


def float_disagreement(
    module: nn.Module, native: nn.Module, shape: torch.Size, source: Container
) -> str | None:
    """How two modules that give floats differ on random integers; None if by float32's rounding only.

    Args:
        module: of the simulation, which reads floats.
        native: the converted one.
        shape: of what they read.
        source: its container.
    """
    integers = _random_integers(shape, source, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module((integers.float() - source.zero_point) * source.scale)
        found = native(make_quantized(integers, source))
    share = float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo().tiny))
    return None if share <= CLOSE else f"by {share:.2g} of the largest value"


def _random_integers(shape: torch.Size, container: Container, generator: torch.Generator) -> Tensor:
    anywhere = torch.randint(0, container.high + 1, shape, generator=generator)
    at_an_end = torch.randint(0, 2, shape, generator=generator) * container.high
    chosen = torch.where(torch.rand(shape, generator=generator) < 0.5, anywhere, at_an_end)
    order = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return chosen.to(torch.uint8).contiguous(memory_format=order)


def _filled(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
