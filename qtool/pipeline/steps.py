"""The steps as functions on a network and batches: calibrate, quantize, evaluate, save, load.

Batches are any iterable; a `transform` turns one item into a tensor of images, or into images and
labels. Without it an item is a tensor, or a sequence whose first two entries are images and labels.
None of the steps changes the caller's network.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from tqdm import tqdm

from qtool.config import QuantizeConfig, check, layer_specs, own_settings
from qtool.errors import ConfigError, DataError, ModelError
from qtool.graph.control import has_decisions
from qtool.graph.fingerprint import check_network, fingerprint
from qtool.graph.trace import layers as traced_layers
from qtool.graph.trace import trace
from qtool.models import read_checkpoint
from qtool.numerics.metrics import top_k_correct
from qtool.numerics.spec import LayerSpec
from qtool.observers.stats import ModelStats
from qtool.pipeline.calibration import chunk_size, chunks, measure
from qtool.pipeline.first_last import with_first_last_bits
from qtool.pipeline.in_float import with_float_output, with_float_sums, with_fused_sums, with_kept_grids
from qtool.pipeline.logits import logits_of
from qtool.pipeline.ranks import ALONE, Ranks
from qtool.quantizers.checkpoint import from_checkpoint, to_checkpoint
from qtool.quantizers.prepare import QuantizedModel, quantize_graph
from qtool.report import Result
from qtool.run_dir import write_whole

Transform = Callable[[Any], Any]
Network = TypeVar("Network", bound=nn.Module)
EXAMPLE_IMAGES = 2
NO_IMAGES = "no images: the data set, or the part of it that was asked for, is empty"


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    transform: Transform | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = False,
    batchwise: str = "auto",
) -> ModelStats:
    """Measure every layer's inputs and output in one pass over the batches.

    Args:
        model: any network that can be traced, or one that trace has given.
        batches: images, (N, C, H, W) or whatever the network takes.
        transform: from an item to images, see above.
        device: where the network runs.
        progress: whether to show a bar on stderr.
        batchwise: how the averages avg_min and avg_max find the images of a tensor: `auto` finds the axis
            that grows with their number, `on` takes axis 0, `off` averages over batches in place of images
            (the result then depends on the size of the first batch).

    Raises:
        DataError: if there are no batches.
        StatsError: if a layer gives NaN or infinity.
    """
    stream = _batches(batches, transform, progress and "calibrating")
    first, _ = next(stream)
    traced = evaluable(_as_traced(model) or trace(model, first[:EXAMPLE_IMAGES]), device)
    # A network that takes branches by values gets batches as they come: its author wrote what it decides.
    decides = has_decisions(traced.graph)
    size = len(first) if decides else chunk_size(tuple(first.shape[1:]))
    images = itertools.chain([first], (images for images, _ in stream))
    group = len(first) if batchwise == "off" else 1
    numbered = enumerate(images if decides else chunks(images, size))
    stats = measure(traced, numbered, size, device=device, batchwise=batchwise, group=group)
    return replace(stats, fingerprint=fingerprint(traced))


def quantize(
    model: nn.Module,
    stats: ModelStats | None,
    config: QuantizeConfig | None = None,
    example: Tensor | None = None,
) -> QuantizedModel:
    """Quantize a network, with activation ranges from statistics or, in dynamic mode, from each batch.

    Args:
        model: a float network, or one that trace has given.
        stats: from calibrate or read_stats, of the same network; None with config.dynamic only.
        config: what is asked; None for the defaults (8 bits, symmetric, per tensor).
        example: an input batch; None makes one of the shape that stats recorded.

    Raises:
        ConfigError: if a setting cannot be honoured.
        StatsError: if a record that is needed is missing, or if they were measured on another network.
        ModelError: if the network cannot be traced.
    """
    config = config or QuantizeConfig()
    check(config)
    if config.dynamic != (stats is None):
        raise ConfigError(
            "dynamic mode takes no statistics, and static mode needs them; "
            f"found dynamic = {config.dynamic} with {'no' if stats is None else 'some'} statistics"
        )
    traced = _as_traced(model) or trace(model, _example_for(stats, example))
    if stats is not None:
        check_network(stats, traced)
    return quantize_graph(traced, stats, specs_for(traced, config), config.per_sample)


def specs_for(traced: fx.GraphModule, config: QuantizeConfig) -> dict[str, LayerSpec]:
    """What a configuration asks of every layer of a network.

    Batch norms that will be folded are layers too: a pattern may name one, to no effect.

    Raises:
        ConfigError: if a pattern matches nothing, or first and last layers are asked for and there are none.
    """
    names = [name for name, _, _ in traced_layers(traced)]
    specs = layer_specs(config, names)
    own = own_settings(config, names)
    if config.first_last_bits is not None:
        specs = with_first_last_bits(traced, specs, config.first_last_bits, own)
    if config.add_rounding == "none":
        specs = with_float_sums(traced, specs, own)
    elif config.add_rounding == "fused":
        specs = with_fused_sums(traced, specs, own)
    if config.max_pool_grid == "input":
        specs = with_kept_grids(traced, specs, own)
    return with_float_output(traced, specs, own) if config.float_output else specs


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    transform: Transform | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: str | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Top-1, top-5 and loss of a network that gives logits (N, classes).

    Args:
        model: float or quantized.
        batches: images with labels.
        transform: from an item to images and labels, see above.
        device: where the network runs.
        progress: what to call the bar on stderr; None for no bar.
        ranks: the processes that share the batches, which then say their numbers.

    Raises:
        DataError: if there are no batches, no labels, or labels that the network has no output for.
    """
    on_device = evaluable(model, device)
    parts: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
    seconds = 0.0
    with torch.no_grad():
        for count, (images, others) in enumerate(_batches(batches, transform, progress, ranks.size > 1)):
            if not others:
                raise DataError("evaluation needs labels: give batches of images and labels, or a transform")
            start = time.perf_counter()
            output = logits_of(on_device(images.to(device))).cpu()
            seconds += time.perf_counter() - start
            indices = torch.as_tensor(others[1]) if len(others) > 1 else None
            number = int(others[2]) if len(others) > 2 else count
            parts.append((number, torch.as_tensor(others[0]).long(), output.float(), indices))
    shares = ranks.gather((parts, seconds))
    whole = sorted((part for share, _ in shares for part in share), key=lambda part: part[0])
    if not whole:
        raise DataError(NO_IMAGES)
    _, labels, logits, numbers = zip(*whole, strict=True)
    known = [n for n in numbers if n is not None]
    return summarize(
        torch.cat(labels), torch.cat(logits), max(s for _, s in shares), torch.cat(known) if known else None
    )


def summarize(labels: Tensor, logits: Tensor, seconds: float, indices: Tensor | None) -> Result:
    """The result of an evaluation whose logits are known.

    Args:
        labels: (N,), int64.
        logits: (N, classes), float32.
        seconds: that they took.
        indices: (N,), numbers of the images in their dataset, or None.

    Raises:
        DataError: if there are labels that the network has no output for.
    """
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        wrong = int(labels.min() if int(labels.min()) < 0 else labels.max())
        raise DataError(
            f"label {wrong} has no output: the network has {logits.shape[1]}; "
            "check the class list and the number of classes"
        )
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    return Result(
        top1=100 * float(top_k_correct(logits, labels, 1).double().mean()),
        top5=100 * float(top_k_correct(logits, labels, 5).double().mean()),
        loss=float(losses.mean()),
        images=len(labels),
        seconds=seconds,
        labels=labels,
        predictions=logits.argmax(dim=1),
        logits=logits,
        indices=indices,
    )


def save(model: QuantizedModel, path: Path, **model_info: Any) -> Path:
    """Write a quantized network; model_info holds plain values to find its architecture again."""
    return write_whole(path, lambda file: torch.save(to_checkpoint(model, **model_info), file))


def load(path: Path, architecture: nn.Module, example: Tensor) -> QuantizedModel:
    """Read a quantized network that save wrote.

    Args:
        path: the file.
        architecture: the float network it was made from; its weights do not matter.
        example: an input batch of the shape it takes.

    Raises:
        ModelError: if the file cannot be read, or is of another network.
    """
    try:
        return from_checkpoint(read_checkpoint(path), architecture, example)
    except ModelError as error:
        raise ModelError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def _batches(
    batches: Iterable[Any],
    transform: Transform | None,
    progress: str | bool | None,
    may_be_empty: bool = False,
) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images, and whatever came with them."""
    count = 0
    shown = tqdm(batches, desc=str(progress), unit="batch", leave=False, disable=None if progress else True)
    for item in shown:
        item = transform(item) if transform else item
        images, others = (item, []) if isinstance(item, Tensor) else (item[0], list(item[1:]))
        if len(images):
            count += len(images)
            yield images, others
    if count == 0 and not may_be_empty:
        raise DataError(NO_IMAGES)


def _as_traced(model: nn.Module) -> fx.GraphModule | None:
    """The network itself if trace has given it."""
    if isinstance(model, fx.GraphModule) and any("layer" in n.meta for n in model.graph.nodes):
        return model
    return None


def example_input(shape: Iterable[int]) -> Tensor:
    """A batch of the same noise every time, for images of a shape (C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(EXAMPLE_IMAGES, *shape, generator=generator)


def _example_for(stats: ModelStats | None, example: Tensor | None) -> Tensor:
    if example is not None:
        return example
    if stats is None:
        raise ConfigError("without statistics the shape of the input is not known; pass an example")
    shape = stats.input_shape()
    if shape is None:
        raise ModelError(f"{stats.source}: does not say the shape of the network's input; pass an example")
    return example_input(shape[1:])


def evaluable(model: Network, device: str | torch.device) -> Network:
    """The network in evaluation mode on a device; a copy if it is not so already."""
    wanted = torch.device(device)
    tensors = [*model.parameters(), *model.buffers()]
    if model.training or any(t.device.type != wanted.type for t in tensors):
        model = copy.deepcopy(model).eval().to(wanted)
    return model
