"""A convolution or linear layer as a matrix product: what it reads at sampled positions, as rows.

One row holds the K inputs of an output position, K = C_in / groups * kernel size; the weight holds as
many numbers for each output channel. A depthwise convolution has as many groups as channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def groups_of(layer: nn.Module) -> int:
    """G, the groups of a layer; 1 for a linear one."""
    return int(getattr(layer, "groups", 1))


def has_rows(layer: nn.Module) -> bool:
    """Whether a layer is one that this file knows: linear, or a convolution that is not transposed."""
    return isinstance(layer, (nn.Linear, *CONVOLUTIONS))


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A weight, output channels first, as matrices; (C_out, ...) -> (G, C_out / G, K)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def choose_positions(layer: nn.Module, x: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    """Output positions at which a layer's input is looked at.

    Args:
        layer: see has_rows.
        x: (N, ...), its input.
        per_image: at most so many of each image, none twice.
        generator: decides which.

    Returns:
        (N * n, 1 + D), int64: the image and the D coordinates of each position.
    """
    extent = list(x.shape[1:-1]) if isinstance(layer, nn.Linear) else output_extent(layer, x)
    count = math.prod(extent)
    images = x.shape[0]
    if count > per_image:
        flat = torch.rand(images, count, generator=generator).topk(per_image, dim=1).indices
        flat = flat.sort(dim=1).values
    else:
        flat = torch.arange(count).expand(images, count)
    coordinates = []
    for size in reversed(extent):
        coordinates.append(flat.remainder(size))
        flat = flat.div(size, rounding_mode="floor")
    image = torch.arange(images).unsqueeze(1).expand(images, min(count, per_image))
    return torch.stack([image, *reversed(coordinates)], dim=-1).flatten(0, 1)


def rows_at(layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """What a layer reads at some output positions.

    Args:
        layer: see has_rows.
        x: (N, ..., C_in) for a linear layer, (N, C_in, ...) for a convolution.
        positions: from choose_positions.

    Returns:
        (G, n, K): rows @ weight.T, group by group, are the outputs without bias.
    """
    where = positions.unbind(1)
    if isinstance(layer, nn.Linear):
        return x[where].unsqueeze(0)  # (1, n, K)
    found = _windows(layer, x)[where]  # (n, C_in, *kernel)
    groups = groups_of(layer)
    return found.reshape(len(positions), groups, -1).transpose(0, 1).contiguous()  # (G, n, K)


def output_extent(layer: Any, x: Tensor) -> list[int]:
    """The spatial size of a convolution's output."""
    before, after = layer._reversed_padding_repeated_twice[::2], layer._reversed_padding_repeated_twice[1::2]
    sizes = []
    for axis, size in enumerate(x.shape[2:]):
        place = len(before) - 1 - axis
        padded = size + before[place] + after[place]
        window = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        sizes.append((padded - window) // layer.stride[axis] + 1)
    return sizes


def _windows(layer: Any, x: Tensor) -> Tensor:
    """A view of a convolution's input, (N, *extent, C_in, *kernel): what each output position reads."""
    extent = output_extent(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(layer._reversed_padding_repeated_twice):
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    image, channel, *space = x.stride()
    steps = [step * stride for step, stride in zip(space, layer.stride, strict=True)]
    inner = [step * dilation for step, dilation in zip(space, layer.dilation, strict=True)]
    shape = (x.shape[0], *extent, x.shape[1], *layer.kernel_size)
    return x.as_strided(shape, (image, *steps, channel, *inner))
