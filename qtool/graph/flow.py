"""Where the channels of a layer's output go: which layers with weights read them, and what is in between.

The question is whether a factor on each channel can be moved from the layer that gives a tensor to those
that read it. Activations such as ReLU let positive factors through; operations that move values are
followed by sending the numbers of the channels through them, so that chunks, heads and windows of
attention need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.graph import ops
from qtool.graph.neighbours import reads_values
from qtool.graph.trace import layers, tensor_inputs

WEIGHTED = frozenset({"conv", "conv_transpose", "linear"})
# f(s x) = s f(x) for s > 0; ReLU6 as well, if its limit moves along.
ACTIVATIONS = frozenset({"relu", "leaky_relu", "prelu", "relu6"})
POOLS = frozenset({f"{kind}{d}d" for d in (1, 2, 3) for kind in (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")})  # fmt: skip
REDUCTIONS = frozenset({"mean", "amax", "sum"})
PADS = frozenset({"pad", *(f"{kind}_pad{d}d" for d in (1, 2, 3) for kind in (
    "zero", "reflection", "replication", "circular"))})  # fmt: skip
# Of those that move values: what stays within one step of a recurrent layer, and other types of numbers.
NOT_FOLLOWED = frozenset(
    {
        *("pick", "begin_steps", "carry", "keep", "end_steps", "last_kept", "as_batch", "as_given"),
        *("to", "double", "half", "type", "type_as", "to_copy"),
    }
)


@dataclass(frozen=True)
class Reader:
    """A layer with weights that reads channels of the source.

    Args:
        name: of the layer.
        channels: (C_in,) int64: the source's channel that each of its input channels is; -1 for zeros.
        passed: the activation layers on the way, in order.
        shifts: whether all else on the way lets a constant on each channel through, too.
    """

    name: str
    channels: Tensor
    passed: tuple[str, ...]
    shifts: bool


@dataclass(frozen=True)
class Stop:
    """A place where factors on channels cannot go on.

    Args:
        why: in words.
        channels: (C,) bool: of the source, those that get there.
    """

    why: str
    channels: Tensor


@dataclass(frozen=True)
class Flow:
    """Where the channels of a layer's output end."""

    readers: tuple[Reader, ...]
    stops: tuple[Stop, ...]


@dataclass(frozen=True)
class _Channels:
    """Which channels a value holds.

    Args:
        numbers: the source's channel + 1 at each place, 0 for zeros; a tensor or a tuple of them.
        axis: of the channels, counted from the end, while they are still where the source has them.
        passed, shifts: see Reader.
    """

    numbers: Any
    axis: int | None
    passed: tuple[str, ...] = ()
    shifts: bool = True


class _Stopped(Exception):
    """Why factors cannot go on."""


def channel_axis_from_end(module: nn.Module) -> int:
    """The axis of a layer's output that holds its channels, counted from the end."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return 1 - weight.dim() if ops.module_op(module) in ("conv", "conv_transpose") else -1


def flow(traced: fx.GraphModule, source: fx.Node) -> Flow:
    """Follow the channels of a layer's output to whatever reads them.

    Args:
        traced: the network.
        source: a convolution or linear layer, or a normalization over the last axis.
    """
    return _Follower(traced, source).run()


class _Follower:
    """Walks the graph behind one layer; held says which channels each value holds."""

    def __init__(self, traced: fx.GraphModule, source: fx.Node) -> None:
        self.traced = traced
        self.source = source
        self.interpreter = fx.Interpreter(traced, garbage_collect_values=False)
        axis = channel_axis_from_end(traced.get_submodule(source.meta["layer"]))
        self.count: int = source.meta["value"].shape[axis]
        self.held = {source: self._in_place(source, _Channels(None, axis))}
        self.readers: list[Reader] = []
        self.stops: list[Stop] = []

    def run(self) -> Flow:
        behind = False
        for node in self.traced.graph.nodes:
            if behind and any(read in self.held for read in node.all_input_nodes):
                self._visit(node)
            behind = behind or node is self.source
        return Flow(tuple(self.readers), tuple(self.stops))

    def _visit(self, node: fx.Node) -> None:
        read = [n for n in node.all_input_nodes if n in self.held]
        if node.op != "output" and not reads_values(node):
            return
        try:
            if node.op == "output":
                raise _Stopped("it is the network's output")
            if len(read) > 1:
                raise _Stopped(f"several parts of it meet in {called(node)}")
            if node.meta.get("guard") != self.source.meta.get("guard"):
                raise _Stopped(f"{called(node)} runs in another branch")
            found = self._step(node, read[0])
            if found is not None:
                self.held[node] = found
        except _Stopped as stopped:
            self.stops.append(Stop(str(stopped), self._mask([self.held[n] for n in read])))

    def _step(self, node: fx.Node, read: fx.Node) -> _Channels | None:
        """What a node holds that reads one value; None for a layer with weights, where the way ends."""
        op, held = str(node.meta["op"]), self.held[read]
        if op in WEIGHTED and "layer" in node.meta:
            self._end(node, held)
            return None
        handler = _HANDLERS.get(op)
        if handler is None and op in ops.MOVES - NOT_FOLLOWED:
            handler = _Follower._moved
        if handler is None:
            raise _Stopped(f"{called(node)} reads it")
        return handler(self, node, read, held)

    def _end(self, node: fx.Node, held: _Channels) -> None:
        module = self.traced.get_submodule(node.meta["layer"])
        axis = channel_axis_from_end(module)
        if tensor_inputs(node)[0] not in self.held or not isinstance(held.numbers, Tensor):
            raise _Stopped(f"{called(node)} reads it")
        numbers = held.numbers.movedim(axis, 0).flatten(1)  # (C_in, ...)
        channels = _only_value(numbers, 1, node).long() - 1
        self.readers.append(Reader(node.meta["layer"], channels, held.passed, held.shifts))

    def _activation(self, node: fx.Node, _read: fx.Node, held: _Channels) -> _Channels:
        if node.meta["op"] == "relu6" and held.axis is None:
            raise _Stopped(f"{called(node)} reads it in another shape")
        return replace(held, passed=(*held.passed, node.meta["layer"]))

    def _kept(self, _node: fx.Node, _read: fx.Node, held: _Channels) -> _Channels:
        return held

    def _pooled(self, node: fx.Node, read: fx.Node, held: _Channels) -> _Channels:
        dims = int(str(node.meta["op"])[-2])
        if not isinstance(held.numbers, Tensor) or not isinstance(node.meta["value"], Tensor):
            raise _Stopped(f"{called(node)} reads it")
        row = _only_value(held.numbers, tuple(range(-dims, 0)), node)
        numbers = row.reshape(*row.shape, *[1] * dims).expand(node.meta["value"].shape)
        return replace(held, numbers=numbers, shifts=held.shifts and self._keeps_ones(node, read))

    def _reduced(self, node: fx.Node, read: fx.Node, held: _Channels) -> _Channels:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(dims, (int, list, tuple)) or not isinstance(held.numbers, Tensor):
            raise _Stopped(f"{called(node)} reads it")
        numbers = _only_value(held.numbers, dims, node).reshape(node.meta["value"].shape)
        return replace(held, numbers=numbers, axis=None, shifts=held.shifts and self._keeps_ones(node, read))

    def _multiplied(self, node: fx.Node, _read: fx.Node, held: _Channels) -> _Channels:
        """A product with a number."""
        if len(tensor_inputs(node)) != 1 or len(list(ops.numbers_in(node.args))) != 1 or node.kwargs:
            raise _Stopped(f"{called(node)} reads it")
        if node.meta["op"] == "div" and not isinstance(node.args[0], fx.Node):
            raise _Stopped(f"{called(node)} reads it")
        return replace(held, shifts=False)

    def _mixed(self, node: fx.Node, read: fx.Node, held: _Channels) -> _Channels:
        """The right-hand side of a matrix product, whose rows are mixed and whose columns stay."""
        if len(node.args) != 2 or node.args[1] is not read or not isinstance(held.numbers, Tensor):
            raise _Stopped(f"{called(node)} reads it")
        row = _only_value(held.numbers, -2, node).unsqueeze(-2)
        return replace(held, numbers=row.expand(node.meta["value"].shape), axis=None, shifts=False)

    def _moved(self, node: fx.Node, read: fx.Node, held: _Channels) -> _Channels:
        return replace(held, numbers=self._computed(node, read, held.numbers), axis=None)

    def _padded(self, node: fx.Node, read: fx.Node, held: _Channels) -> _Channels:
        nothing = self._computed(node, read, torch.zeros(read.meta["value"].shape))
        if bool((nothing != 0).any()):
            raise _Stopped(f"{called(node)} puts a constant beside it")
        numbers = self._computed(node, read, held.numbers)
        return replace(held, numbers=numbers, shifts=held.shifts and self._keeps_ones(node, read))

    def _keeps_ones(self, node: fx.Node, read: fx.Node) -> bool:
        """Whether a node gives the constant that it reads."""
        ones = self._computed(node, read, torch.ones(read.meta["value"].shape))
        return bool(((ones - 1).abs() < 1e-6).all())

    def _computed(self, node: fx.Node, read: fx.Node, value: Any) -> Any:
        """What a node gives for other numbers in place of what it reads."""
        env: dict[fx.Node, Any] = {n: n.meta["value"] for n in node.all_input_nodes}
        env |= {n: ops.attribute(self.traced, str(n.target)) for n in env if n.op == "get_attr"}
        self.interpreter.env = {**env, read: value}
        try:
            with torch.no_grad():
                return self.interpreter.run_node(node)
        except Exception as error:  # whatever an operation says to numbers that are not its own
            raise _Stopped(f"{called(node)} reads it") from error

    def _in_place(self, node: fx.Node, held: _Channels) -> _Channels:
        """The numbers of the channels in the shape of a node that has them where the source has them."""
        assert held.axis is not None
        numbers = torch.arange(1.0, self.count + 1).reshape(-1, *[1] * (-held.axis - 1))
        return replace(held, numbers=numbers.expand(node.meta["value"].shape))

    def _mask(self, several: list[_Channels]) -> Tensor:
        found = torch.zeros(self.count + 1, dtype=torch.bool)
        for held in several:
            parts = held.numbers if isinstance(held.numbers, (tuple, list)) else [held.numbers]
            for numbers in parts:
                found[numbers.unique().long()] = True
        return found[1:]


def _only_value(numbers: Tensor, dims: int | list[int] | tuple[int, ...], node: fx.Node) -> Tensor:
    """The one value along some axes, zeros aside.

    Raises:
        _Stopped: if there are several.
    """
    high = numbers.amax(dims)
    low = torch.where(numbers == 0, torch.inf, numbers).amin(dims)
    if bool(((high != low) & (high != 0)).any()):
        raise _Stopped(f"{called(node)} mixes its channels")
    return high


def called(node: fx.Node) -> str:
    """A node in words."""
    name = node.meta.get("layer")
    return f"{node.meta['op']!s}" if name is None else f"{name!r} ({node.meta['op']})"


_Handler = Callable[[_Follower, fx.Node, fx.Node, _Channels], _Channels]
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(ACTIVATIONS, _Follower._activation),
    **dict.fromkeys(ops.KEEPS_GRID, _Follower._kept),
    **dict.fromkeys(POOLS, _Follower._pooled),
    **dict.fromkeys(REDUCTIONS, _Follower._reduced),
    **dict.fromkeys(("mul", "div"), _Follower._multiplied),
    "matmul": _Follower._mixed,
    **dict.fromkeys(PADS, _Follower._padded),
}


def shared_parameters(traced: fx.GraphModule) -> dict[str, str]:
    """Layers whose weight is also another's: name -> the name of one other."""
    owners: dict[tuple[int, torch.Size], list[str]] = {}
    for name, _, module in layers(traced):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not weight.is_meta:
            owners.setdefault((weight.data_ptr(), weight.shape), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len(names) > 1
        for name in names
    }
