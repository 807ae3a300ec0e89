"""The fingerprint of a traced network, and whether statistics carry the same one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from qtool.errors import StatsError
from qtool.graph.observe import example_size
from qtool.graph.trace import layers
from qtool.observers.fingerprint import Fingerprint
from qtool.observers.stats import ModelStats

MEASURE = "measure this network with 'qtool calibrate'"


def fingerprint(traced: fx.GraphModule) -> Fingerprint:
    """What a network is, without its weights: its layers, and the sizes of what they give for one image."""
    inputs = [n.meta.get("value") for n in traced.graph.nodes if n.op == "placeholder"]
    shapes, images = _output_shapes(traced), example_size(traced)
    sizes = [None if s is None else (len(s), math.prod(s) / images) for s in shapes.values()]
    return Fingerprint(
        inputs=tuple(tuple(value.shape[1:]) for value in inputs if isinstance(value, Tensor)),
        names=_sha256("\n".join(shapes)),
        sizes=_sha256("\n".join(str(size) for size in sizes)),
    )


def with_weights(traced: fx.GraphModule) -> Fingerprint:
    """The fingerprint with that of all parameters and buffers; counters of training batches do not matter."""
    state = traced.state_dict().items()
    weights = tensors_sha256((k, v) for k, v in state if not k.endswith("num_batches_tracked"))
    return replace(fingerprint(traced), weights=weights)


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_network(stats: ModelStats, traced: fx.GraphModule) -> None:
    """Refuse statistics that were measured on a network of other layers, or of other sizes.

    Statistics without a fingerprint, such as Distiller's, pass. Sizes are compared only if both
    networks were traced with images of one size.

    Raises:
        StatsError: naming what differs.
    """
    there = stats.fingerprint
    if there is None:
        return
    here = fingerprint(traced)
    if there.names != here.names:
        difference = _difference_of_names(stats, traced)
    elif there.inputs == here.inputs and there.sizes != here.sizes:
        difference = _difference_of_shapes(stats, traced)
    else:
        return
    raise StatsError(f"{stats.source}: measured on another network: {difference}; {MEASURE}")


def _difference_of_names(stats: ModelStats, traced: fx.GraphModule) -> str:
    here = {name: None for name, _, _ in layers(traced)}
    only_there = [name for name in stats.layers if name not in here]
    only_here = [name for name in here if name not in stats.layers]
    parts = []
    if only_there:
        parts.append(f"{len(only_there)} of its layers are not in this one, such as {only_there[0]!r}")
    if only_here:
        parts.append(f"{len(only_here)} layers of this one are not in it, such as {only_here[0]!r}")
    return " and ".join(parts) or "its layers come in another order"


def _difference_of_shapes(stats: ModelStats, traced: fx.GraphModule) -> str:
    for name, shape in _output_shapes(traced).items():
        record = stats.layers[name].output if name in stats.layers else None
        if record is None or record.shape is None or shape is None or record.shape[1:] == shape[1:]:
            continue
        return f"the output of layer {name!r} has shape {_of_one(record.shape)}, here {_of_one(shape)}"
    return "its layers give tensors of other shapes"


def _of_one(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape[1:])


def _output_shapes(traced: fx.GraphModule) -> dict[str, tuple[int, ...] | None]:
    """The shape of what each layer gives; None for several tensors, and for what is not of an image each."""
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) and value.dim() and not decides else None
        for name, value, decides in (
            (name, node.meta["value"], node.meta.get("decides")) for name, node, _ in layers(traced)
        )
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
