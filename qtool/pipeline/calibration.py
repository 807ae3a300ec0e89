"""One pass of the calibration images through the network, all of its tensors observed.

The images go through in chunks whose size depends on the size of an image alone. A chunk's part in the
statistics is the same wherever and whenever it is computed, so neither the size of the batches that
the images come in nor the number of processes changes a byte of the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qtool.graph.fast import Fast, fast
from qtool.graph.observe import Observation
from qtool.graph.trace import float_tensors

LOG = logging.getLogger("qtool")

# Elements of the input that make a chunk: sixteen images of 3 x 224 x 224. With fewer, torch takes a slow way
# through 1 x 1 convolutions when it has one thread; activations of more do not
# stay in the cache.
CHUNK_ELEMENTS = 16 * 3 * 224 * 224
MAX_CHUNK = 128
# How far the fast form of the network may be from the network, relative to the largest output.
FAST_TOLERANCE = 1e-3


def chunk_size(image_shape: tuple[int, ...]) -> int:
    """How many images of a shape go through the network together: a power of two, 1 to MAX_CHUNK.

    Example:
        >>> chunk_size((3, 224, 224)), chunk_size((3, 32, 32))
        (16, 128)
    """
    fitting = CHUNK_ELEMENTS / max(1, math.prod(image_shape))
    return 1 << max(0, min(int(math.log2(max(1.0, fitting))), MAX_CHUNK.bit_length() - 1))


def chunks(batches: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in the same order, size at a time; the last chunk may be smaller."""
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count >= size:
            together = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            whole = count // size * size
            yield from torch.split(together[:whole], size)
            waiting, count = [together[whole:]], count - whole
    if count:
        yield torch.cat(waiting)


def run_chunks(
    observation: Observation,
    batches: Iterator[Tensor],
    device: str | torch.device,
    start: int = 0,
    step: int = 1,
) -> None:
    """Send images through the network, those of every step-th chunk from number start on."""
    size: int | None = None
    number = start
    first_batch = next(batches)
    size = chunk_size(tuple(first_batch.shape[1:]))

    def all_batches() -> Iterator[Tensor]:
        yield first_batch
        yield from batches

    for images in chunks(all_batches(), size):
        on_device = images.to(device)
        if on_device.dim() == 4:
            on_device = on_device.contiguous(memory_format=torch.channels_last)
        observation.run(on_device, number, number * size)
        number += step


def fast_or_plain(traced: fx.GraphModule, image: Tensor) -> Fast:
    """The fast form of a network; the network itself where that computes something else on one image."""
    network = fast(traced)
    try:
        for a, b in zip(float_tensors(traced(image)), float_tensors(network.traced(image)), strict=True):
            off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            if not off <= FAST_TOLERANCE and bool(torch.isfinite(a).all()):
                raise ValueError(f"its output is off by {off:.1e}")
    except (RuntimeError, ValueError) as error:
        LOG.warning("calibrating without the faster form of the network: %s", error)
        return Fast(traced, {})
    return network
