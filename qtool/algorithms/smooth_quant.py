"""SmoothQuant: outliers of activations moved into the weights that read them.

    y = (x / s) (s W)      s_c = max|x_c|^alpha / max|W_c|^(1 - alpha)

The division is folded into what gives x: a layer norm, or a layer with weights whose channels get to
their readers through nothing but ReLU and the like, or through an attention's mixing of tokens.
Where it cannot be folded nothing is done: a multiplication of its own would cost at run time, and be
one more tensor to quantize.

Reference:
    Xiao et al. 2022, arXiv:2211.10438, section 4; bounds and groups as in NNCF's SmoothQuant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.links import (
    NO_CHANNELS,
    Link,
    Rescaling,
    changes,
    channel_magnitudes,
    gathered_max,
    groups_of,
    input_maxima,
    magnitudes,
    range_ratio,
)
from qtool.algorithms.records import CorrectionReport
from qtool.errors import ConfigError
from qtool.graph import ops
from qtool.graph.edit import replace_layers
from qtool.graph.flow import WEIGHTED, Flow, Reader, called, channel_axis_from_end, flow, shared_parameters
from qtool.graph.fold import Folded, output_channels_first
from qtool.graph.trace import layers as graph_layers
from qtool.graph.trace import tensor_inputs
from qtool.observers.stats import ModelStats

METHOD = "smooth_quant"
# Normalizations that end with a factor for each entry of the last axis.
NORMS = frozenset({"layer_norm", "rmsnorm"})
SMALLEST = 1e-5
EPSILON = 1.19e-7
LARGEST_FACTOR = 100.0
# No factor is below this quantile of all of a layer's.
LOWEST_QUANTILE = 0.1


@dataclass(frozen=True)
class SmoothQuantSettings:
    """How to smooth.

    Args:
        alpha: how much of the difficulty goes from activations to weights, 0 to 1.
        alphas: others for single layers, by name or by an expression that matches a whole name; a layer's
            very name wins, else the first expression.
        convolutions: whether the inputs of convolutions are smoothed, too.

    Raises:
        ValueError: if an alpha is out of its range.
    """

    alpha: float = 0.5
    alphas: Mapping[str, float] = field(default_factory=dict)
    convolutions: bool = False

    def __post_init__(self) -> None:
        for what, alpha in (("alpha", self.alpha), *((f"alphas.{k}", v) for k, v in self.alphas.items())):
            if not 0 <= alpha <= 1:
                raise ValueError(f"{what} must be 0 to 1, found {alpha}")

    def alpha_of(self, name: str) -> float:
        """The alpha of a layer."""
        if name in self.alphas:
            return self.alphas[name]
        matching = (alpha for pattern, alpha in self.alphas.items() if re.fullmatch(pattern, name))
        return next(matching, self.alpha)


def smoothing_factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What to divide the channels of a layer's input by, (C,).

    Args:
        activations: the largest magnitude of each input channel, (C,).
        weights: of the weights that read it, (C,).
        alpha: 0 leaves activations as wide as they are relative to each other, 1 makes them all alike.

    Example:
        >>> smoothing_factors(torch.full((3,), 4.0), torch.full((3,), 4.0), 0.5).float()
        tensor([1.0000, 1.0000, 1.0000])
    """
    a, w = activations.double().clamp(min=SMALLEST), weights.double().clamp(min=SMALLEST)
    s = a**alpha / (w ** (1 - alpha) + EPSILON)
    if not s.numel() or not bool(torch.isfinite(s).all()):
        return torch.full_like(s, torch.nan)
    return s.clamp(min=float(torch.quantile(s, LOWEST_QUANTILE))).clamp(max=LARGEST_FACTOR)


def mildest(candidates: Sequence[Tensor]) -> int | None:
    """Which factors differ least between channels; None if all of them are NaN.

    Example:
        >>> mildest([torch.tensor([1.0, 10.0]), torch.tensor([2.0, 4.0]), torch.tensor([torch.nan])])
        1
    """
    best, found = 0.0, None
    for index, s in enumerate(candidates):
        ratio = float(s.min() / (s.max() + EPSILON)) if s.numel() else 0.0
        if ratio > best:
            best, found = ratio, index
    return found


def smooth(
    folded: Folded,
    stats: ModelStats,
    *,
    layers: Collection[str],
    settings: SmoothQuantSettings | None = None,
) -> tuple[Folded, CorrectionReport]:
    """Move outliers of the inputs of linear layers into their weights; the float function stays.

    Args:
        folded: the network, batch norms folded; it stays as it was.
        stats: of the same network, with ranges of channels.
        layers: the names of the layers whose weights may be changed. Layer norms in front of them may be
            changed whether they are among these or not.
        settings: None for the defaults.

    Returns:
        The new network, and which layers were changed by how much, or left alone and why.

    Raises:
        ConfigError: if an expression for an alpha is none, or matches no layer.
    """
    settings = settings or SmoothQuantSettings()
    _check_patterns(settings, [name for name, _, _ in graph_layers(folded.traced)])
    work = _Smoothing(folded.traced, stats, layers, settings)
    for name, node, module in graph_layers(folded.traced):
        if _may_take_factors(module):
            work.source(name, node)
    new = replace_layers(folded.traced, {name: module for name, _, module in work.rescaling.layers()})
    report = CorrectionReport(METHOD, changes(folded.traced, new, work.notes), work.left())
    return Folded(new, folded.pairs), report


def _check_patterns(settings: SmoothQuantSettings, names: Sequence[str]) -> None:
    for pattern in settings.alphas:
        try:
            found = pattern in names or any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ConfigError(
                f"{METHOD}: alphas: {pattern!r} is no regular expression: {error}; correct it"
            ) from error
        if not found:
            raise ConfigError(
                f"{METHOD}: alphas: {pattern!r} matches no layer; 'qtool layers' lists the names"
            )


def _may_take_factors(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_norm = ops.module_op(module) in NORMS and isinstance(weight, Tensor) and weight.dim() == 1
    return is_norm or ops.module_op(module) in WEIGHTED


class _Smoothing:
    """The factors found so far, source after source.

    Attributes:
        rescaling: the factors.
        notes: on sources and readers, for the report.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        stats: ModelStats,
        names: Collection[str],
        settings: SmoothQuantSettings,
    ) -> None:
        self.traced = traced
        self.stats = stats
        self.names = names
        self.settings = settings
        self.shared = shared_parameters(traced)
        self.rescaling = Rescaling(traced)
        self.notes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.done: set[str] = set()

    def source(self, name: str, node: fx.Node) -> None:
        """Divide the output of a layer, as far as its readers make up for it."""
        found = flow(self.traced, node)
        wanted = [reader for reader in found.readers if self._is_wanted(reader.name)]
        if not wanted:
            return
        module = self.traced.get_submodule(name)
        axis = channel_axis_from_end(module)
        channels: int = node.meta["value"].shape[axis]
        free = self._free_channels(found, wanted, channels)
        why = self._why_not(name, module, found, free, wanted)
        if why is None:
            why = self._divide(Link(name, found.readers, channels, axis), wanted, free)
        for reader in wanted:
            if why is None:
                self.done.add(reader.name)
            else:
                self.reasons[reader.name] = why

    def left(self) -> dict[str, str]:
        """Why layers were not smoothed, in the order of execution."""
        found = {}
        for name, node, _ in graph_layers(self.traced):
            if name in self.done or not self._is_wanted(name):
                continue
            found[name] = self.reasons.get(name) or _where_from(node)
        return found

    def _is_wanted(self, name: str) -> bool:
        op = ops.module_op(self.traced.get_submodule(name))
        return name in self.names and (op == "linear" or (op in WEIGHTED and self.settings.convolutions))

    def _free_channels(self, found: Flow, wanted: Sequence[Reader], channels: int) -> Tensor:
        """The channels that wanted layers read, and nothing else does; (C,) bool."""
        stopped = torch.zeros(channels, dtype=torch.bool)
        for stop in found.stops:
            stopped |= stop.channels
        for reader in found.readers:
            if reader not in wanted:
                stopped |= _read(reader, channels)
        read = torch.stack([_read(reader, channels) for reader in wanted]).any(0)
        return read & ~stopped

    def _why_not(
        self, name: str, module: nn.Module, found: Flow, free: Tensor, wanted: Sequence[Reader]
    ) -> str | None:
        if not bool(free.any()):
            others = [reader.name for reader in found.readers if reader not in wanted]
            what = found.stops[0].why if found.stops else f"{others[0]!r} reads it"
            return f"{name!r}, which gives its input, cannot take factors: {what}"
        if ops.module_op(module) in WEIGHTED and name not in self.names:
            return f"{name!r}, which gives its input, is not to be changed"
        for one in (name, *(reader.name for reader in wanted)):
            if one in self.shared:
                return f"{one!r} has its weights in common with {self.shared[one]!r}"
        return None

    def _divide(self, link: Link, wanted: Sequence[Reader], free: Tensor) -> str | None:
        """Put factors on a link; why not, in words, or None."""
        candidates, places, ranges = [], [], []
        for reader in wanted:
            name = reader.passed[-1] if reader.passed else link.first
            record = self.stats.layers[name].output if name in self.stats.layers else None
            activations = channel_magnitudes(record, link.channels)
            if activations is None:
                return NO_CHANNELS
            place = free & _read(reader, link.channels)
            alpha = self.settings.alpha_of(reader.name)
            weights = self._weight_maxima(reader, link.channels)
            candidates.append(smoothing_factors(activations[place], weights[place], alpha))
            places.append(place)
            ranges.append(activations)
        chosen = mildest(candidates)
        if chosen is None:
            return "its weights or the statistics of its input hold NaN or infinity"
        factors = torch.ones(link.channels, dtype=torch.float64)
        factors[places[chosen]] = candidates[chosen]
        self.rescaling.divide(link, factors)
        before = ranges[chosen][places[chosen]]
        ratios = [range_ratio(before), range_ratio(before / candidates[chosen])]
        self.notes[link.first] = (
            f"largest over smallest range of its output's channels {ratios[0]:.3g} -> {ratios[1]:.3g}"
        )
        return None

    def _weight_maxima(self, reader: Reader, channels: int) -> Tensor:
        module = self.traced.get_submodule(reader.name)
        found = input_maxima(magnitudes(output_channels_first(module)), groups_of(module))
        return gathered_max(found, reader.channels, channels)


def _read(reader: Reader, channels: int) -> Tensor:
    """Which channels of the source a layer reads; (C,) bool."""
    found = torch.zeros(channels + 1, dtype=torch.bool)
    found[reader.channels + 1] = True
    return found[1:]


def _where_from(node: fx.Node) -> str:
    """Why no source reached a layer: what gives its input."""
    source = tensor_inputs(node)[0]
    while "layer" not in source.meta and source.op not in ("placeholder", "get_attr"):
        sources = tensor_inputs(source) or source.all_input_nodes
        if not sources:
            break
        source = sources[0]
    if source.op == "placeholder":
        return "its input is the network's"
    return f"its input comes from {called(source)}, which can take no factors"
