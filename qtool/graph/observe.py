"""Attach observers to a traced network, and always detach them.

Every tensor is observed once. A layer's input is its producer's output, or the same values in another
shape, and is filed under both names; only inputs that no layer produced (the network's own, a part of
a tensor) get an observer of their own, one for all their readers in the same branch of the code. The
output of a ReLU has the extremes of its input, limited.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

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
from qtool.observers.moments import mean_of
from qtool.observers.rows import Extremes, as_rows
from qtool.observers.scan import compile_all
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


@dataclass(frozen=True)
class _Watch:
    """One tensor that is observed.

    Args:
        key: what it is filed under, see key_of.
        node: whose values it has.
        seen: the node that gives them the shape in which they are observed.
        where: what is called where it is.
    """

    key: str
    node: fx.Node
    seen: fx.Node
    where: str


@dataclass
class _Share:
    """What has been gathered from some of the chunks, which went through the network one after the other.

    Args:
        chunk: the one that is going through the network.
        observers: by key, each from the first chunk of its tensor on.
        axes: the axis of the images of each tensor, by key.
    """

    chunk: Chunk
    observers: dict[str, TensorObserver] = field(default_factory=dict)
    axes: dict[str, int | None] = field(default_factory=dict)


@dataclass
class Observation:
    """Which observers watch which tensors of a network, and what they have gathered.

    Chunks may go through the network at the same time, each in a thread of its own.

    Args:
        network: what runs.
        batchwise: `auto` finds the images' axis of each tensor, `on` takes axis 0; `off` as auto.
        pivots: by key, for parts of a calibration that are to be merged; those of the first chunk are
            added, which goes through alone unless look or the caller has given all.
    """

    network: Fast
    batchwise: str = "auto"
    pivots: dict[str, float] = field(default_factory=dict)
    watches: dict[str, _Watch] = field(default_factory=dict)
    _looking: bool = False
    _shares: list[_Share] = field(default_factory=list)
    _idle: list[_Share] = field(default_factory=list)
    _running: threading.local = field(default_factory=threading.local)
    _warned: set[str] = field(default_factory=set)

    def look(self, images: Tensor) -> None:
        """Take the pivots of some images, and nothing else."""
        self._looking = True
        try:
            self.network.traced(images)
        finally:
            self._looking = False

    def run(self, images: Tensor, number: int, first: int) -> Any:
        """Send a chunk of images through the network and observe every tensor.

        Raises:
            NonFiniteError: if a layer gives NaN or infinity.
        """
        chunk = Chunk(number, first, len(images))
        if self._idle:
            share = self._idle.pop()
            share.chunk = chunk
        else:
            share = _Share(chunk)
            self._shares.append(share)
        self._running.share = share
        try:
            return self.network.traced(images)
        finally:
            self._idle.append(share)

    def sums(self) -> dict[str, TensorSums]:
        """What was gathered, by key, see key_of; nothing of what did not run."""
        return merged_sums(
            {key: sums for key, o in share.observers.items() if (sums := o.sums()) is not None}
            for share in self._shares
        )

    def see(self, watch: _Watch, x: Tensor, clamped: _Watch | None = None) -> None:
        """Give one tensor of the present chunk to its observer.

        Args:
            watch: of the tensor.
            x: the tensor.
            clamped: of what an activation function makes of it; that is written over x, while parts of
                it are in the cache.
        """
        if self._looking:
            self._take_pivots(watch, x.detach(), clamped)
            return
        share: _Share = self._running.share
        values = x.detach().float()
        observer, clamp = self._observer(share, watch, values), None
        if clamped is not None:
            limits = INTERVALS[str(clamped.node.meta["op"])]
            clamp = Clamp(*limits, self._observer(share, clamped, values))
        try:
            axis = share.axes[watch.key]
            rows = as_rows(values, share.chunk.images, axis, channel_axis(watch.seen))
            observer.update(rows, share.chunk, self._known(share, watch), clamp)
        except NotFinite as error:
            raise NonFiniteError(watch.where, error.image, str(error)) from error
        except ValueError as error:
            raise StatsError(f"calibration: {watch.where}: {error}") from error
        for seen in filter(None, (watch, clamped)):
            pivot = share.observers[seen.key].pivot
            assert pivot is not None
            self.pivots.setdefault(seen.key, pivot)
        if clamp is not None and rows.values.data_ptr() != x.data_ptr():  # rows were a copy
            x.clamp_(clamp.low, clamp.high)

    def _take_pivots(self, watch: _Watch, x: Tensor, clamped: _Watch | None) -> None:
        self.pivots.setdefault(watch.key, mean_of(x))
        if clamped is not None:
            self.pivots.setdefault(clamped.key, mean_of(x.clamp_(*INTERVALS[str(clamped.node.meta["op"])])))

    def _observer(self, share: _Share, watch: _Watch, x: Tensor) -> TensorObserver:
        if watch.key not in share.observers:
            axis = self._axis_of(share.chunk, watch, x)
            shape = list(x.shape)
            if axis is not None:
                shape[axis] //= share.chunk.images
            share.axes[watch.key] = axis
            share.observers[watch.key] = TensorObserver(tuple(shape), self.pivots.get(watch.key))
        return share.observers[watch.key]

    def _axis_of(self, chunk: Chunk, watch: _Watch, x: Tensor) -> int | None:
        """The axis of the images; a tensor without one is a single row of each chunk."""
        images, example = chunk.images, tuple(watch.seen.meta["value"].shape)
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

    def _known(self, share: _Share, watch: _Watch) -> Extremes | None:
        """The extremes of a ReLU's output, if those of its input are known and say enough."""
        op = str(watch.node.meta["op"])
        limits = INTERVALS[op] if op in FUSIBLE else None
        sources = tensor_inputs(watch.node)
        if limits is None or len(sources) != 1 or self._is_capped(watch.node):
            return None
        key = key_of(sources[0], watch.node)
        source = share.observers.get(key)
        if source is None or share.axes[key] != share.axes[watch.key]:
            return None
        number, found = source.latest or (None, None)
        return found.clamped(*limits) if found is not None and number == share.chunk.number else None

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
    observation = Observation(network, batchwise, dict(pivots or {}))
    compile_all()
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


def merged_sums(parts: Iterable[dict[str, TensorSums]]) -> dict[str, TensorSums]:
    """The sums of all chunks, out of those of some; a part that had none of a tensor has none."""
    merged: dict[str, TensorSums] = {}
    for part in parts:
        for name, sums in part.items():
            merged[name] = merged[name].merge(sums) if name in merged else sums
    return merged


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
