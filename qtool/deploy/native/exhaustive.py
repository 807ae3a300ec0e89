"""Whether an int8 kernel gives the simulation's integers for everything that two grids can hold.

A kernel that reads integers of 8 bits one by one has 256 cases, one that reads two of them 65536: few
enough to try them all. A case that differs would be met in every image, as often as its integers are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qtool.deploy.native.containers import Container, make_quantized


def same_pairs(
    simulated: nn.Module,
    native: nn.Module,
    inputs: Sequence[Container],
    output: Container,
    ties: float = 0.0,
) -> bool:
    """Whether two modules of two tensors, element by element, give the same for all pairs of integers.

    Args:
        simulated: takes and gives centered integers.
        native: takes and gives quantized tensors.
        inputs: containers of the two tensors.
        output: container of the result.
        ties: share of the pairs that may be rounded to the other neighbour, 0 to 1.
    """
    a, b = (torch.arange(x.high + 1) for x in inputs)
    pairs = torch.meshgrid(a, b, indexing="ij")
    return _same(simulated(*_centered(pairs, inputs)), native(*_quantized(pairs, inputs)), output, ties)


def same_joined(
    simulated: nn.Module, native: nn.Module, inputs: Sequence[Container], output: Container
) -> bool:
    """Likewise for two modules that join a list of tensors, for all integers of each."""
    integers = [torch.arange(x.high + 1).reshape(1, -1) for x in inputs]
    found = native(_quantized(integers, inputs), 1)
    return _same(simulated(_centered(integers, inputs), 1), found, output)


def _centered(integers: Sequence[Tensor], inputs: Sequence[Container]) -> list[Tensor]:
    return [x.float() - c.zero_point for x, c in zip(integers, inputs, strict=True)]


def _quantized(integers: Sequence[Tensor], inputs: Sequence[Container]) -> list[Tensor]:
    return [make_quantized(x.to(torch.uint8).contiguous(), c) for x, c in zip(integers, inputs, strict=True)]


def _same(expected: Tensor, found: Tensor, output: Container, ties: float = 0.0) -> bool:
    off = (found.int_repr().float() - output.zero_point - expected).abs()
    return float(off.max()) <= 1 and float((off > 0).double().mean()) <= ties
