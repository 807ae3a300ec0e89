"""Parts of a tensor that fit into a processor's cache, for work that goes over its values several times."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Values of a part: 1 MB of float32, or one image where an image is larger.
BLOCK = 2**18


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Views of tensors of one shape, the same images of each; a single one where there is nothing to gain.

    Example:
        >>> [a.shape[0] for (a,) in blocks(torch.zeros(5, 2**17))]
        [2, 2, 1]
    """
    first = tensors[0]
    if torch.compiler.is_compiling():  # one loop over all passes needs no parts
        return [tensors]
    if first.device.type != "cpu" or first.dim() < 2 or first.numel() <= BLOCK:
        return [tensors]
    if any(t.requires_grad for t in tensors):  # parts of such a tensor cannot be written to
        return [tensors]
    images = max(1, BLOCK * len(first) // first.numel())
    return zip(*(torch.split(t, images) for t in tensors), strict=True)


def memory_blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Flat views of tensors of one shape, the same values of each, or the tensors where their orders differ.

    Example:
        >>> x = torch.zeros(2, 3, 4, 4)
        >>> [a.shape for a, _ in memory_blocks(x, x)], len(list(memory_blocks(x, x.transpose(2, 3))))
        ([torch.Size([96])], 1)
    """
    first = tensors[0]
    dense = first.is_contiguous() or (
        first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or any(t.stride() != first.stride() or t.shape != first.shape for t in tensors):
        return [tensors]
    flat = (t.as_strided((t.numel(),), (1,), t.storage_offset()) for t in tensors)
    return zip(*(torch.split(t, BLOCK // 2) for t in flat), strict=True)
