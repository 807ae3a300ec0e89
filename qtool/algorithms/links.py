"""Factors and constants on the channels between layers, moved from the layer in front to those behind.

    W1 / s, b1 / s   ->   f(x / s) = f(x) / s   ->   W2 s                  (f: ReLU and the like, or nothing)
    b1 - c           ->   f(x - c) = f(x) - c   ->   b2 + sum over the kernel of W2 c

What is computed stays the same. A link is one place where this can be done; a Rescaling gathers the
factors of several before any layer is replaced. Weights are (C_out, C_in / groups, ...) throughout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.records import LayerChange, relative_change
from qtool.graph import ops
from qtool.graph.capped import PLAIN_LIMIT, CappedReLU6, limit_of
from qtool.graph.edit import with_parameters
from qtool.graph.flow import WEIGHTED, Flow, Reader, channel_axis_from_end, flow, shared_parameters
from qtool.graph.fold import output_channels_first, restore_layout
from qtool.graph.trace import layers
from qtool.observers.stats import ActivationStats

NO_CHANNELS = "the statistics have no ranges of its channels; run 'qtool calibrate' again"


@dataclass(frozen=True)
class Link:
    """A layer, and those that alone read its output.

    Args:
        first: the name of the layer in front.
        readers: those behind.
        channels: how many there are.
        axis: of the channels in the output of first, counted from the end.
    """

    first: str
    readers: tuple[Reader, ...]
    channels: int
    axis: int

    @property
    def passed(self) -> tuple[str, ...]:
        """The activation layers between, each once."""
        return tuple(dict.fromkeys(name for reader in self.readers for name in reader.passed))

    @property
    def names(self) -> tuple[str, ...]:
        """The layers with weights, that in front first."""
        return (self.first, *(reader.name for reader in self.readers))


def find_links(traced: fx.GraphModule, names: Collection[str]) -> tuple[list[Link], dict[str, str]]:
    """Every place between layers of these names where all channels have factors of their own to give.

    Returns:
        The links in the order of execution, and why there is none behind a layer: name -> words. The
        network's last layers are not among these.
    """
    shared = shared_parameters(traced)
    links: list[Link] = []
    left: dict[str, str] = {}
    for name, node, module in layers(traced):
        if name not in names or node.meta["op"] not in WEIGHTED:
            continue
        found = flow(traced, node)
        why = _why_not(name, found, names, shared)
        if why is not None:
            left |= {name: why} if why else {}
            continue
        axis = channel_axis_from_end(module)
        links.append(Link(name, found.readers, node.meta["value"].shape[axis], axis))
    return links, left


def _why_not(name: str, found: Flow, names: Collection[str], shared: Mapping[str, str]) -> str | None:
    """Why a layer is not the first of a link: in words, "" for the network's last one; None if it is."""
    if found.stops:
        only_end = not found.readers and all("network's output" in stop.why for stop in found.stops)
        return "" if only_end else found.stops[0].why
    if not found.readers:
        return ""
    for one in (name, *(reader.name for reader in found.readers)):
        if one in shared:
            return f"{one!r} has its weights in common with {shared[one]!r}"
        if one not in names:
            return f"{one!r}, which reads it, is not to be changed"
    return None


def spread(values: Tensor, channels: Tensor, elsewhere: float) -> Tensor:
    """Values of the source's channels at the channels of a reader; (C,) and (C_in,) int64 give (C_in,)."""
    return torch.where(channels >= 0, values[channels.clamp(min=0)], elsewhere)


def gathered_max(values: Tensor, channels: Tensor, count: int) -> Tensor:
    """For each channel of the source, the largest value of a reader's channels, 0 if it reads none; (C,)."""
    found = torch.zeros(count + 1, dtype=values.dtype)
    return found.scatter_reduce(0, channels + 1, values, "amax")[1:]


def magnitudes(weight: Tensor) -> Tensor:
    """The largest magnitude of each kernel: (C_out, C_in / groups, ...) to (C_out, C_in / groups)."""
    sizes = weight.detach().abs()
    return sizes.flatten(2).amax(2) if weight.dim() > 2 else sizes


def by_groups(matrix: Tensor, groups: int) -> Tensor:
    """(C_out, C_in / G) to (G, C_out / G, C_in / G)."""
    return matrix.reshape(groups, -1, matrix.shape[1])


def of_inputs(values: Tensor, groups: int) -> Tensor:
    """Values of input channels (C_in,), in the shape that broadcasts with by_groups."""
    return values.reshape(groups, 1, -1)


def input_maxima(matrix: Tensor, groups: int) -> Tensor:
    """The largest entry of each input channel: (C_out, C_in / G) to (C_in,)."""
    return by_groups(matrix, groups).amax(1).flatten()


def scaled_weight(weight: Tensor, groups: int, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """A weight whose output channels are divided by outputs (C_out,), its input channels multiplied by inputs
    (C_in,); in its own dtype."""
    found = weight.detach().double()
    if inputs is not None:
        grouped = found.reshape(groups, -1, *found.shape[1:])  # (G, C_out / G, C_in / G, ...)
        factors = inputs.double().reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        found = (grouped * factors).reshape(weight.shape)
    if outputs is not None:
        found = found / outputs.double().reshape(-1, *[1] * (weight.dim() - 1))
    return found.to(weight.dtype)


def response(weight: Tensor, groups: int, constants: Tensor) -> Tensor:
    """What a layer gives away from borders for a constant on each input channel, without its bias.

    Args:
        weight: (C_out, C_in / groups, ...).
        groups: of the layer.
        constants: (C_in,).

    Returns:
        (C_out,), float64.

    Example:
        >>> response(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), 2, torch.tensor([10.0, 1.0])).tolist()
        [30.0, 7.0]
    """
    sums = weight.detach().double().reshape(*weight.shape[:2], -1).sum(2)  # (C_out, C_in / G)
    return (by_groups(sums, groups) * of_inputs(constants.double(), groups)).sum(2).flatten()


def groups_of(layer: nn.Module) -> int:
    """A convolution's groups; 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


@dataclass
class Rescaling:
    """Factors on the channels of a network's links, gathered before any layer is replaced.

    Args:
        traced: the network.

    Attributes:
        outputs: what the output channels of layers are divided by, (C_out,) float64.
        inputs: what the input channels of layers are multiplied by, (C_in,) float64.
        activations: what the channels behind ReLU6 layers are divided by: (C, 1, ...), float64.
    """

    traced: fx.GraphModule
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)

    def divide(self, link: Link, factors: Tensor) -> None:
        """Divide the channels of a link by factors (C,), on top of those that it has."""
        factors = factors.double()
        _multiply(self.outputs, link.first, factors)
        for reader in link.readers:
            _multiply(self.inputs, reader.name, spread(factors, reader.channels, 1.0))
        for name in link.passed:
            if ops.module_op(self.traced.get_submodule(name)) == "relu6":
                _multiply(self.activations, name, factors.reshape(-1, *[1] * (-link.axis - 1)))

    def layers(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """The layers that change, in the order of execution: name, module, new module."""
        for name, _, module in layers(self.traced):
            new = self._new(name, module)
            if new is not None:
                yield name, module, new

    def _new(self, name: str, module: nn.Module) -> nn.Module | None:
        outputs, inputs = _unless_ones(self.outputs.get(name)), _unless_ones(self.inputs.get(name))
        activation = _unless_ones(self.activations.get(name))
        if activation is not None:
            before = limit_of(module)
            limit = (PLAIN_LIMIT if before is None else before.double()) / activation
            return CappedReLU6(limit.float())
        if outputs is None and inputs is None:
            return None
        return scaled_layer(module, outputs, inputs)


def _multiply(found: dict[str, Tensor], name: str, factors: Tensor) -> None:
    found[name] = found[name] * factors if name in found else factors


def _unless_ones(factors: Tensor | None) -> Tensor | None:
    return None if factors is None or bool((factors == 1).all()) else factors


def scaled_layer(module: nn.Module, outputs: Tensor | None, inputs: Tensor | None) -> nn.Module:
    """A copy of a layer that gives its output divided by outputs, and reads its input divided by inputs."""
    own: Any = module
    if ops.module_op(module) in WEIGHTED:
        weight = scaled_weight(output_channels_first(module), groups_of(module), outputs, inputs)
        found = {"weight": restore_layout(weight, module)}
    else:  # a normalization: one factor for each channel
        assert outputs is not None and inputs is None
        found = {"weight": (own.weight.double() / outputs).to(own.weight.dtype)}
    if outputs is not None and getattr(module, "bias", None) is not None:
        found["bias"] = (own.bias.double() / outputs).to(own.bias.dtype)
    return with_parameters(module, **found)


def bias_of(module: Any) -> Tensor:
    """A layer's bias, or the zeros that it stands for; (C_out,), float64."""
    if module.bias is not None:
        return module.bias.detach().double()  # type: ignore[no-any-return]
    return torch.zeros(output_channels_first(module).shape[0], dtype=torch.float64)


class Shifts:
    """Constants moved from the biases in front of links to those behind, gathered before layers are replaced.

    Args:
        traced: the network.

    Attributes:
        biases: of the layers that change, (C_out,), float64.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.biases: dict[str, Tensor] = {}

    def subtract(self, link: Link, constants: Tensor) -> None:
        """Take constants (C,) off the channels of a link, whose readers make up for it."""
        self._add(link.first, -constants.double())
        for reader in link.readers:
            module = self.traced.get_submodule(reader.name)
            read = spread(constants.double(), reader.channels, 0.0)
            self._add(reader.name, response(output_channels_first(module), groups_of(module), read))

    def layers(self) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """The layers that change, in the order of execution: name, module, new module."""
        for name, _, module in layers(self.traced):
            if name in self.biases:
                weight = output_channels_first(module)
                yield name, module, with_parameters(module, bias=self.biases[name].to(weight.dtype))

    def _add(self, name: str, values: Tensor) -> None:
        if name not in self.biases:
            self.biases[name] = bias_of(self.traced.get_submodule(name))
        self.biases[name] = self.biases[name] + values


def why_no_shift(link: Link, traced: fx.GraphModule) -> str | None:
    """Why constants cannot be moved over a link, in words; None if they can."""
    for reader in link.readers:
        if not reader.shifts:
            return f"what is between it and {reader.name!r} does not let constants through"
        if _pads_with_zeros(traced.get_submodule(reader.name)):
            return f"{reader.name!r} pads its input with zeros, which would need another bias at its borders"
    return None


def _pads_with_zeros(module: Any) -> bool:
    op = ops.module_op(module)
    if op == "linear":
        return False
    if op == "conv_transpose":
        return True
    padding = module.padding
    wide = padding == "same" and any(size > 1 for size in module.kernel_size)
    some = not isinstance(padding, str) and any(padding)
    return module.padding_mode == "zeros" and (wide or some)


def channel_magnitudes(record: ActivationStats | None, channels: int) -> Tensor | None:
    """The largest magnitude of each channel in a record, (C,) float64; None if it does not say."""
    if record is None or record.channel_min is None or record.channel_max is None:
        return None
    ends = [torch.from_numpy(values.copy()).double() for values in (record.channel_min, record.channel_max)]
    return torch.maximum(-ends[0], ends[1]) if len(ends[0]) == channels else None


def changes(
    before: fx.GraphModule, after: fx.GraphModule, notes: Mapping[str, str] | None = None
) -> tuple[LayerChange, ...]:
    """The layers whose weight or bias differs between two networks.

    Args:
        before, after: networks of the same layers.
        notes: on single layers, in place of how their weights' ranges changed.
    """
    old = {name: module for name, _, module in layers(before)}
    found = []
    for name, _, module in layers(after):
        if module is old[name] or getattr(module, "weight", None) is None:
            continue
        note = _note(module, old[name]) if notes is None else notes.get(name, "")
        found.append(LayerChange(name, _change(module, old[name]), note))
    return tuple(found)


def _change(new: Any, old: Any) -> float:
    """The larger one of the changes of weight and bias."""
    sizes = [relative_change(new.weight, old.weight)]
    if getattr(new, "bias", None) is not None:
        before = torch.zeros_like(new.bias) if old.bias is None else old.bias
        sizes.append(relative_change(new.bias, before))
    return max(sizes)


def _note(new: nn.Module, old: nn.Module) -> str:
    ratios = [range_ratio(magnitudes(output_channels_first(module)).amax(1)) for module in (old, new)]
    return f"largest over smallest range of its output channels {ratios[0]:.3g} -> {ratios[1]:.3g}"


def range_ratio(ranges: Tensor) -> float:
    """The largest over the smallest range of the channels that have one, (C,); 1 if none has.

    Example:
        >>> range_ratio(torch.tensor([0.0, 2.0, 8.0]))
        4.0
    """
    live = ranges[(ranges > 0) & torch.isfinite(ranges)]
    return float(live.max() / live.min()) if live.numel() else 1.0
