"""Attach observers to a traced network, and always detach them.

Every tensor is observed once. A layer's input is its producer's output, or the same values in another
shape, and is filed under both names; only inputs that no layer produced (the network's own, a part of
a tensor) get an observer of their own, one for all their readers in the same branch of the code. The
output of a ReLU has the extremes of its input, limited.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from qtool.errors import StatsError
from qtool.graph import ops
from qtool.graph.axes import batch_axis, channel_axis
from qtool.graph.capped import limit_of
from qtool.graph.fast import IN_PLACE, Fast
from qtool.graph.neighbours import FUSIBLE, INTERVALS
from qtool.graph.trace import float_tensors, is_mask, layers, tensor_inputs
from qtool.graph.unbounded import is_unbounded
from qtool.observers.kernels import CACHED, Extremes, as_rows
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats
from qtool.observers.sums import TensorSums
from qtool.observers.tensor import Chunk, Clamp, NotFinite, TensorObserver

LOG = logging.getLogger("qtool")

# What gives back the values of its input, all of them, in another shape or order within each image.
SAME_VALUES = ops.KEEPS_GRID | {
    *("flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze"),
    *("permute", "transpose", "t", "movedim", "moveaxis", "alias"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}


class NonFiniteError(StatsError):
    """A layer gave NaN or infinity; image is the number of the first image for which it did."""

    def __init__(self, where: str, image: int, cause: str) -> None:
        super().__init__(
            f"calibration: {where} holds {cause}, first for image {image}; check the weights and the images"
        )
        self.where, self.image, self.cause = where, image, cause


@dataclass
class _Watch:
    """One tensor that is observed.

    Args:
        key: what it is filed under, see key_of.
        node: whose values it has.
        seen: the node that gives them the shape in which they are observed.
        where: what is called where it is.
        observer: what gathers its statistics, from its first chunk on.
        axis: the axis of its images.
    """

    key: str
    node: fx.Node
    seen: fx.Node
    where: str
    observer: TensorObserver | None = None
    axis: int | None = 0


@dataclass
class Observation:
    """Which observer watches which tensor of a network, and the chunk that is going through it.

    Args:
        network: what runs.
        batchwise: `auto` finds the images' axis of each tensor, `on` takes axis 0; `off` as auto.
        pivots: by key, for parts of a calibration that are to be merged.
    """

    network: Fast
    batchwise: str = "auto"
    pivots: Mapping[str, float] = field(default_factory=dict)
    chunk: Chunk | None = None
    watches: dict[str, _Watch] = field(default_factory=dict)
    _scratch: Tensor | None = None
    _warned: set[str] = field(default_factory=set)

    def run(self, images: Tensor, number: int, first: int) -> Any:
        """Send a chunk of images through the network and observe every tensor.

        Raises:
            NonFiniteError: if a layer gives NaN or infinity.
        """
        self.chunk = Chunk(number, first, len(images))
        return self.network.traced(images)

    def sums(self) -> dict[str, TensorSums]:
        """What was gathered, by key, see key_of; nothing of what did not run."""
        found = {key: w.observer.sums() for key, w in self.watches.items() if w.observer is not None}
        return {name: sums for name, sums in found.items() if sums is not None}

    def pivots_found(self) -> dict[str, float]:
        """From which value deviations are measured, by key."""
        watched = {key: w.observer for key, w in self.watches.items() if w.observer is not None}
        return {name: o.pivot for name, o in watched.items() if o.pivot is not None}

    def see(self, watch: _Watch, x: Tensor, clamped: _Watch | None = None) -> None:
        """Give one tensor of the present chunk to its observer.

        Args:
            watch: of the tensor.
            x: the tensor.
            clamped: of what an activation function makes of it; that is written over x, while parts of
                it are in the cache.
        """
        assert self.chunk is not None
        values = x.detach().float()
        if self._scratch is None or self._scratch.device != x.device:
            self._scratch = torch.empty(CACHED, device=x.device)
        observer, clamp = self._observer(watch, values), None
        if clamped is not None:
            limits = INTERVALS[str(clamped.node.meta["op"])]
            clamp = Clamp(*limits, self._observer(clamped, values))
        try:
            rows = as_rows(values, self.chunk.images, watch.axis, channel_axis(watch.seen))
            observer.update(rows, self.chunk, self._scratch, self._known(watch), clamp)
        except NotFinite as error:
            raise NonFiniteError(watch.where, error.image, str(error)) from error
        except ValueError as error:
            raise StatsError(f"calibration: {watch.where}: {error}") from error
        if clamp is not None and rows.values.data_ptr() != x.data_ptr():  # rows were a copy
            x.clamp_(clamp.low, clamp.high)

    def _observer(self, watch: _Watch, x: Tensor) -> TensorObserver:
        if watch.observer is None:
            self._start(watch, x)
        assert watch.observer is not None
        return watch.observer

    def _start(self, watch: _Watch, x: Tensor) -> None:
        assert self.chunk is not None
        watch.axis = self._axis_of(watch, x)
        shape = list(x.shape)
        if watch.axis is not None:
            shape[watch.axis] //= self.chunk.images
        watch.observer = TensorObserver(tuple(shape), self.pivots.get(watch.key))

    def _axis_of(self, watch: _Watch, x: Tensor) -> int | None:
        """The axis of the images; a tensor without one is a single row of each chunk."""
        assert self.chunk is not None
        images, example = self.chunk.images, tuple(watch.seen.meta["value"].shape)
        example_images = example_size(self.network.traced)
        by_rows = 0 if x.dim() and x.shape[0] % images == 0 else None
        if self.batchwise == "on" or images == example_images:
            return by_rows
        try:
            return batch_axis(tuple(x.shape), images, example, example_images)
        except ValueError as error:
            op = str(watch.seen.meta["op"])
            if op not in self._warned:
                self._warned.add(op)
                LOG.warning(
                    "%s (%s): which axis holds the images cannot be told (%s); "
                    "its averages are over %s; --batchwise-statistics on takes axis 0",
                    watch.where, op, error, "axis 0" if by_rows == 0 else "chunks of images",
                )  # fmt: skip
            return by_rows

    def _known(self, watch: _Watch) -> Extremes | None:
        """The extremes of a ReLU's output, if those of its input are known and say enough."""
        assert self.chunk is not None
        op = str(watch.node.meta["op"])
        limits = INTERVALS[op] if op in FUSIBLE else None
        sources = tensor_inputs(watch.node)
        if limits is None or len(sources) != 1 or self._is_capped(watch.node):
            return None
        source = self.watches.get(key_of(sources[0], watch.node))
        if source is None or source.observer is None or source.axis != watch.axis:
            return None
        number, found = source.observer.latest or (None, None)
        return found.clamped(*limits) if found is not None and number == self.chunk.number else None

    def _is_capped(self, node: fx.Node) -> bool:
        """Whether its limit differs between channels, which the extremes of an image do not tell apart."""
        return limit_of(self.network.traced.get_submodule(node.meta["layer"])) is not None


@contextmanager
def observe(
    network: Fast, batchwise: str = "auto", pivots: Mapping[str, float] | None = None
) -> Iterator[Observation]:
    """Watch every layer's inputs and output while chunks run inside the `with` block.

    Args:
        network: what runs, from fast.
        batchwise, pivots: see Observation.
    """
    observation = Observation(network, batchwise, pivots or {})
    handles: list[RemovableHandle] = []
    watches = observation.watches
    written_over = _written_over(network.traced)
    activations = {
        node.meta["layer"]: network.traced.get_submodule(node.meta["layer"]) for node in written_over.values()
    }
    try:
        for name in activations:
            network.traced.set_submodule(name, nn.Identity())
        for name, node, module in layers(network.traced):
            fresh = []
            for index, source in enumerate(tensor_inputs(node)):
                key, first = key_of(source, node), origin(source)
                if _gives_record(first) or key in watches or is_mask(node, index):
                    continue
                watches[key] = _Watch(key, first, source, f"the input {index} of layer {name!r}")
                fresh.append((index, watches[key]))
            if fresh:
                handles.append(_watch_inputs(observation, module, fresh))
            if _gives_record(node):
                watches[node.name] = _Watch(node.name, node, node, f"the output of layer {name!r}")
                if name not in activations:
                    handles.append(
                        _watch_output(observation, module, watches[node.name], written_over.get(node))
                    )
        yield observation
    finally:
        for handle in handles:
            handle.remove()
        for name, activation in activations.items():
            network.traced.set_submodule(name, activation)


def _written_over(traced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Nodes whose result an activation function writes over, and its node."""
    return {
        node.all_input_nodes[0]: node
        for _, node, module in layers(traced)
        if isinstance(module, tuple(IN_PLACE.values())) and module.inplace
    }


def example_size(traced: fx.GraphModule) -> int:
    """How many images the example had that a network was traced with."""
    values = (n.meta["value"] for n in traced.graph.nodes if n.op == "placeholder")
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 1)


def origin(node: fx.Node) -> fx.Node:
    """The node whose values another one gives back in another shape."""
    while node.meta.get("op") in SAME_VALUES and "layer" not in node.meta:
        sources = tensor_inputs(node)
        if len(sources) != 1 or sources[0].meta["value"].numel() != node.meta["value"].numel():
            break
        (node,) = sources
    return node


def _gives_record(node: fx.Node) -> bool:
    """Whether a node is a layer whose output is observed."""
    return "layer" in node.meta and ops.is_float_tensor(node.meta["value"]) and not is_unbounded(node)


def key_of(source: fx.Node, reader: fx.Node) -> str:
    """What an input of a layer is filed under; one that no layer gives has a record for each branch."""
    source, guard = origin(source), reader.meta.get("guard")
    return f"{source.name} if {guard}" if guard and not _gives_record(source) else source.name


def model_stats(network: Fast, sums: Mapping[str, TensorSums], group: int = 1) -> ModelStats:
    """The records of all layers, each tensor filed under every name it has.

    Args:
        network: what ran.
        sums: see Observation.sums.
        group: how many images make one item of the averages.
    """
    records = {name: part.stats(group) for name, part in sums.items()}
    example = example_size(network.traced)
    norms = {layer: norm for norm, layer in network.folded.items()}
    found: dict[str, LayerStats] = {}
    for name, node, _ in layers(network.traced):
        sources = [(i, s, key_of(s, node)) for i, s in enumerate(tensor_inputs(node))]
        inputs = {
            i: _seen_as(records[key], s, example)
            for i, s, key in sources
            if key in records and not is_mask(node, i)
        }
        output = records.get(node.name)
        if output is None and _gives_record(node):
            continue  # no image took its branch
        if name in norms:
            found[name] = LayerStats(inputs, None)
            found[norms[name]] = LayerStats({}, output)
        else:
            found[name] = LayerStats(inputs, output)
    return ModelStats(found)


def _seen_as(record: ActivationStats, node: fx.Node, example: int) -> ActivationStats:
    """The record of the same values in the shape that a node gives them; example: images of the example."""
    if node is origin(node):
        return record
    shape = list(node.meta["value"].shape)
    if shape and shape[0] % example == 0:
        shape[0] //= example
    return replace(record, shape=tuple(shape), channel_min=None, channel_max=None)


def _watch_inputs(
    observation: Observation, module: nn.Module, watches: list[tuple[int, _Watch]]
) -> RemovableHandle:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = float_tensors((args, kwargs))
        for index, watch in watches:
            observation.see(watch, tensors[index])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _watch_output(
    observation: Observation, module: nn.Module, watch: _Watch, activation: fx.Node | None
) -> RemovableHandle:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        observation.see(watch, output, None if activation is None else observation.watches[activation.name])

    return module.register_forward_hook(hook)
