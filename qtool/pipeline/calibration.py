"""One pass of the calibration images through the network, all of its tensors observed.

The images go through in chunks whose size depends on the size of an image alone. A chunk's part in the
statistics is the same wherever and whenever it is computed, so neither the size of the batches that
the images come in nor the number of threads and processes changes a byte of the result.

On the CPU several chunks are on their way at once, each on a share of the threads: what is computed for a
tensor takes so little time that threads which share it would wait for each other most of it.
"""

from __future__ import annotations

import itertools
import logging
import math
import mmap
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, fx

from qtool.graph.control import UncapturedPath, has_decisions
from qtool.graph.fast import Fast, fast
from qtool.graph.liveness import most_live_bytes
from qtool.graph.observe import example_size, merged_sums, model_stats, observe
from qtool.graph.trace import float_tensors
from qtool.observers.stats import ModelStats
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.pipeline.threads import run_in_threads

LOG = logging.getLogger("qtool")

# Elements of the input that make a chunk: 32 images of 3 x 224 x 224. With fewer, starting operations takes
# a larger share of the time, and torch takes a slow way through 1 x 1 convolutions when it has one thread.
CHUNK_ELEMENTS = 32 * 3 * 224 * 224
MAX_CHUNK = 128
# Chunks that are on their way at once, at most: each takes memory for the largest activations.
TOGETHER = 4
# How much room tensors of changing sizes take up, relative to their own.
SPREAD = 2.5
# How far the fast form of the network may be from the network, relative to the largest output.
FAST_TOLERANCE = 1e-3


def chunk_size(image_shape: tuple[int, ...]) -> int:
    """How many images of a shape go through the network together: a power of two, 1 to MAX_CHUNK.

    Example:
        >>> chunk_size((3, 224, 224)), chunk_size((3, 32, 32))
        (32, 128)
    """
    fitting = CHUNK_ELEMENTS / max(1, math.prod(image_shape))
    return 1 << max(0, min(int(math.log2(max(1.0, fitting))), MAX_CHUNK.bit_length() - 1))


def chunks(batches: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in the same order, size at a time; the last chunk of a shape may be smaller.

    Sequences of another length, and images of another size, begin a new chunk.
    """
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        if waiting and waiting[0].shape[1:] != batch.shape[1:]:
            if count:
                yield torch.cat(waiting)
            waiting, count = [], 0
        waiting.append(batch)
        count += len(batch)
        if count >= size:
            together = waiting[0] if len(waiting) == 1 else torch.cat(waiting)
            whole = count // size * size
            yield from torch.split(together[:whole], size)
            waiting, count = [together[whole:]], count - whole
    if count:
        yield torch.cat(waiting)


def measure(
    traced: fx.GraphModule,
    stream: Iterable[tuple[int, Tensor]],
    size: int,
    *,
    device: str | torch.device = "cpu",
    batchwise: str = "auto",
    group: int = 1,
    ranks: Ranks = ALONE,
) -> ModelStats:
    """The statistics of all tensors of a network, of the chunks of all processes.

    Args:
        traced: in evaluation mode, on device.
        stream: number and images of each chunk of this process; chunk number k starts with image k * size.
        size: images of a whole chunk.
        device: where the network is.
        batchwise: see graph.observe.Observation.
        group: how many images make one item of the averages.
        ranks: the processes that share the chunks, which are the k-th ones of process k, k + K, ...

    Raises:
        NonFiniteError, StatsError: see Observation.run.
        ProcessEnded: if another process has ended.
    """
    chunks_left = iter(stream)
    with torch.no_grad():
        network = fast_or_plain(traced)
        pivots = None if ranks.first else ranks.from_first(None)
        with observe(network, batchwise, pivots) as observation:

            def run(number: int, images: Tensor) -> None:
                with torch.no_grad():  # which is a thread's own setting
                    observation.run(_as_input(images, device), number, number * size)

            def look(images: Tensor) -> None:
                with torch.no_grad():
                    observation.look(_as_input(images, device))

            decides = has_decisions(traced.graph)
            together = 1 if decides or torch.device(device).type != "cpu" else TOGETHER
            waiting = list(itertools.islice(chunks_left, 2))
            if ranks.first:
                # All threads and processes measure deviations from the same values, the first image's; where
                # images take branches, from those of the chunk that takes them first. Those are the same for
                # every number of threads too, if as many as a chunk has compute them.
                if waiting and decides:
                    run(*waiting.pop(0))
                elif waiting:
                    run_in_threads(look, [(waiting[0][1][:1],)], together)
                ranks.from_first(observation.pivots)
            if together > 1 and len(waiting) > 1:
                _reserve(network.traced, size * min(together, torch.get_num_threads()))
            run_in_threads(run, itertools.chain(waiting, chunks_left), together)
            return model_stats(network, merged_sums(ranks.gather(observation.sums())), group)


def _reserve(traced: fx.GraphModule, images: int) -> None:
    """Take the memory that so many images on their way need, and give it back.

    Where freed memory is kept, see qtool.memory, the blocks of threads that take and free them in changing
    order come to lie in what was taken here. Otherwise they would spread out bit by bit, and a long
    calibration would need more memory than a short one.
    """
    example = max(1, example_size(traced))
    held = most_live_bytes(traced) * images // example
    with suppress(RuntimeError):  # there is less memory; it may do all the same
        torch.empty(int(held * SPREAD), dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(0)


def _as_input(images: Tensor, device: str | torch.device) -> Tensor:
    images = images.to(device)
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def fast_or_plain(traced: fx.GraphModule) -> Fast:
    """The fast form of a network; the network itself where that computes something else on noise."""
    network = fast(traced)
    values = [n.meta["value"] for n in traced.graph.nodes if n.op == "placeholder"]
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    noise = [torch.randn(v[:1].shape, generator=generator).to(device, v.dtype) for v in values]
    try:
        pairs = zip(float_tensors(traced(*noise)), float_tensors(network.traced(*noise)), strict=True)
        for a, b in pairs:
            off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            if not off <= FAST_TOLERANCE and bool(torch.isfinite(a).all()):
                raise ValueError(f"its output is off by {off:.1e}")
    except UncapturedPath:  # noise leads where images do not
        return Fast(traced, {})
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        LOG.warning("calibrating without the faster form of the network: %s", str(error).splitlines()[0])
        return Fast(traced, {})
    return network
