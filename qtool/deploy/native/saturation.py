"""Which sums can be cut off where pairs of 8-bit products are added up in 16 bits.

x86 processors without VNNI multiply unsigned activations with signed weights by an instruction that
adds two neighbouring products and saturates at 32767. Whether that can happen depends on the weights
that are neighbours and on the largest activation: two of 127 with activations to 255 give 64770. With
activations of 7 bits, as torch's reduce_range makes them, it never does: 127 * (128 + 128) = 32512.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_SUM = 32767
SAFE_BITS = 7


def saturating_channels(weight: Tensor, largest_input: int) -> Tensor:
    """The output channels of which two neighbouring products can exceed 16 bits.

    Kernels read weights with the input channels innermost, in blocks of a multiple of two. Where the
    number of channels is odd, some fill each block up with zeros and some go on with the next tap of
    the window; both are taken into account.

    Args:
        weight: (C_out, C_in, ...), the integers that the kernel is given, -128 to 127.
        largest_input: of the activations as unsigned integers, 0 to 255.

    Returns:
        (C_out,), bool.

    Example:
        >>> w = torch.tensor([[100, 100, 1, 1], [100, 1, 100, 1]])
        >>> saturating_channels(w, 255).tolist(), saturating_channels(w, 127).tolist()
        ([True, False], [False, False])
    """
    taps_outside = weight.to(torch.int64).movedim(1, -1)  # (C_out, ..., C_in)
    blocks = [taps_outside.flatten(1), _even(taps_outside).flatten(1)]
    return torch.stack([_largest_pair(_even(b)) * largest_input > LARGEST_SUM for b in blocks]).any(dim=0)


def _even(x: Tensor) -> Tensor:
    """With a zero at the end of the last axis if its length is odd."""
    return F.pad(x, (0, x.shape[-1] % 2))


def _largest_pair(flat: Tensor) -> Tensor:
    """The largest magnitude of a pair's sum, activations 0 or 1: (C_out, K) -> (C_out,)."""
    pairs = flat.reshape(len(flat), -1, 2)
    positive, negative = pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1)
    return torch.maximum(positive, negative).amax(dim=1)
