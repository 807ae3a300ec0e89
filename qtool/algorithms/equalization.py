"""Cross-layer equalization: factors on channels that make the ranges of all channels alike.

A pair of layers computes the same if its middle tensor is divided by s_i in channel i and the second
layer's weights multiplied by it. With s_i = sqrt(r1_i / r2_i) both weights have the range sqrt(r1_i r2_i)
in that channel, so that one grid for a whole weight fits all channels. ReLU6 in between ends at
6 / s_i then. Grids per channel of weights leave the benefit to the activations: `by: activations` takes
their ranges as r1.

Reference:
    Nagel et al. 2019, arXiv:1906.04721 (DFQ), sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.links import (
    NO_CHANNELS,
    Link,
    Rescaling,
    Shifts,
    by_groups,
    changes,
    channel_magnitudes,
    find_links,
    gathered_max,
    groups_of,
    input_maxima,
    magnitudes,
    of_inputs,
    why_no_shift,
)
from qtool.algorithms.records import CorrectionReport
from qtool.graph.capped import PLAIN_LIMIT, CappedReLU6, limit_of
from qtool.graph.edit import replace_layers
from qtool.graph.fold import Folded, output_channels_first
from qtool.graph.ops import module_op
from qtool.observers.stats import ModelStats

METHOD = "equalization"


@dataclass(frozen=True)
class EqualizationSettings:
    """How to equalize.

    Args:
        by: "weights" for ranges of weights alone, as grids per tensor of weights want it; "activations" for
            those of activations against the weights behind them, as grids per channel want it.
        sweeps: how often all links are gone through, at most.
        tolerance: a sweep whose factors are all this close to 1 is the last.
        limit: no channel is multiplied or divided by more than this.
        absorb: whether biases that keep a ReLU's input above zero on all calibration images are moved on.

    Raises:
        ValueError: if one is out of its range.
    """

    by: str = "weights"
    sweeps: int = 20
    tolerance: float = 1e-3
    limit: float = 10.0
    absorb: bool = False

    def __post_init__(self) -> None:
        if self.by not in ("weights", "activations"):
            raise ValueError(f"by must be weights or activations, found {self.by!r}")
        if self.sweeps < 1:
            raise ValueError(f"sweeps must be at least 1, found {self.sweeps}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be more than 0, found {self.tolerance}")
        if not self.limit > 1:
            raise ValueError(f"limit must be more than 1, found {self.limit}")


def pair_factors(r1: Tensor, r2: Tensor) -> Tensor:
    """sqrt(r1 / r2) for two ranges of each channel, (C,); 1 where one is zero, infinite or NaN.

    Example:
        >>> pair_factors(torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 3.0])).tolist()
        [2.0, 0.5, 1.0]
    """
    s = (r1 / r2).sqrt()
    return torch.where(torch.isfinite(s) & (s > 0), s, 1.0)


def triple_factors(r1: Tensor, r2: Tensor, r3: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in front of and behind a depthwise layer that make three ranges equal, (C,) each.

    s1 = r1 / g and s2 = g / r3 with g = (r1 r2 r3)^(1/3); 1 where a range is zero, infinite or NaN.

    Example:
        >>> s1, s2 = triple_factors(*(torch.tensor([r]) for r in (8.0, 1.0, 1.0)))
        >>> round(s1.item(), 4), round(s2.item(), 4)
        (4.0, 2.0)
    """
    mean = (r1 * r2 * r3) ** (1 / 3)
    s1, s2 = r1 / mean, mean / r3
    usable = (mean > 0) & torch.isfinite(s1 * s2) & (s1 * s2 > 0)
    return torch.where(usable, s1, 1.0), torch.where(usable, s2, 1.0)


def centered(s: Tensor, live: Tensor) -> Tensor:
    """Factors (C,) divided by their geometric mean over the live channels, (C,) bool; the others are 1."""
    if not bool(live.any()):
        return torch.ones_like(s)
    mean = s[live].log().mean().exp()
    return torch.where(live, s / mean, 1.0)


def equalize(
    folded: Folded,
    stats: ModelStats,
    *,
    layers: Collection[str],
    settings: EqualizationSettings | None = None,
) -> tuple[Folded, CorrectionReport]:
    """Equalize the ranges of channels across convolutions and linear layers; the float function stays.

    Args:
        folded: the network, batch norms folded; it stays as it was.
        stats: of the same network, moved along with the folding. Ranges of channels in them are needed for
            `by: activations` and `absorb` only. Those of the new network are others: measure it again.
        layers: the names of the layers that may be changed.
        settings: None for the defaults.

    Returns:
        The new network, and which layers were changed by how much; under `left` what stands behind a layer
        that could not take part.
    """
    settings = settings or EqualizationSettings()
    traced = folded.traced
    links, left = find_links(traced, layers)
    if settings.by == "activations":
        measured = {link.first: _activation_range(link, traced, stats) for link in links}
        left |= {name: NO_CHANNELS for name, found in measured.items() if found is None}
        links = [link for link in links if measured[link.first] is not None]
        work = _Sweeps(traced, links, settings.limit, {k: v for k, v in measured.items() if v is not None})
    else:
        work = _Sweeps(traced, links, settings.limit)
    for _ in range(settings.sweeps):
        if work.sweep() < settings.tolerance:
            break
    new = {name: module for name, _, module in work.rescaling.layers()}
    scaled = replace_layers(traced, new)
    if settings.absorb:
        absorbed, not_absorbed = _absorbed(scaled, links, stats, work.totals)
        left |= {name: why for name, why in not_absorbed.items() if name not in left}
        scaled = replace_layers(scaled, absorbed)
    return Folded(scaled, folded.pairs), CorrectionReport(METHOD, changes(traced, scaled), left)


class _Sweeps:
    """The factors found so far.

    Args:
        traced: the network.
        links: where factors may go.
        limit: see EqualizationSettings.
        activations: the range of each link's middle tensor, by its first layer; empty for `by: weights`.

    Attributes:
        rescaling: the product of all factors.
        totals: the same by name of a link's first layer, (C,).
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        links: list[Link],
        limit: float,
        activations: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.rescaling = Rescaling(traced)
        self.links = links
        self.limit = limit
        self.activations = activations or {}
        self.totals = {link.first: torch.ones(link.channels, dtype=torch.float64) for link in links}
        modules = {name: traced.get_submodule(name) for link in links for name in link.names}
        self.groups = {name: groups_of(module) for name, module in modules.items()}
        self.weights = {name: magnitudes(output_channels_first(module)) for name, module in modules.items()}

    def sweep(self) -> float:
        """Go through all links once; how far from 1 the factor furthest from it was."""
        largest, done = 0.0, set()
        by_first = {link.first: link for link in self.links}
        for link in self.links:
            if link.first in done:
                continue
            behind = None if self.activations else self._triple(link, by_first)
            if behind is not None:
                factors = triple_factors(
                    self._range_in_front(link), self._depthwise_range(link), self._range_behind(behind)
                )
                found = list(zip((link, behind), factors, strict=True))
                done.add(behind.first)
            else:
                found = [(link, self._factors(link))]
            largest = max(largest, *(self._divide(one, s) for one, s in found))
        return largest

    def _factors(self, link: Link) -> Tensor:
        behind = self._range_behind(link)
        if not self.activations:
            return pair_factors(self._range_in_front(link), behind)
        found = self.activations[link.first] / self.totals[link.first]
        live = (found > 0) & (behind > 0) & torch.isfinite(found * behind)
        # Each channel of a depthwise layer has a grid of its own: its weights take any factor.
        one_to_one = all(self._is_depthwise(reader.name) for reader in link.readers)
        return centered(found if one_to_one else (found / behind).sqrt(), live)

    def _divide(self, link: Link, factors: Tensor) -> float:
        """Divide a link as far as the limit allows; how far from 1 that is."""
        before = self.totals[link.first]
        total = (before * factors).clamp(1 / self.limit, self.limit)
        self.totals[link.first] = total
        self.rescaling.divide(link, total / before)
        return float((total / before - 1).abs().max())

    def _triple(self, link: Link, by_first: Mapping[str, Link]) -> Link | None:
        """The link behind a depthwise layer that alone reads this one."""
        (reader, *others) = link.readers
        in_order = torch.equal(reader.channels, torch.arange(link.channels))
        return (
            by_first.get(reader.name) if not others and in_order and self._is_depthwise(reader.name) else None
        )

    def _is_depthwise(self, name: str) -> bool:
        return self.groups[name] > 1 and self.weights[name].shape == (self.groups[name], 1)

    def _range_in_front(self, link: Link) -> Tensor:
        """The range of each output channel with all factors so far, (C_out,)."""
        name, groups = link.first, self.groups[link.first]
        inputs, outputs = self.rescaling.inputs.get(name), self.rescaling.outputs.get(name)
        weight = self.weights[name]
        if inputs is not None:
            weight = (by_groups(weight, groups) * of_inputs(inputs.float(), groups)).reshape(weight.shape)
        found = weight.amax(1).double()
        return found if outputs is None else found / outputs

    def _depthwise_range(self, link: Link) -> Tensor:
        return self._input_range(link.readers[0].name)

    def _range_behind(self, link: Link) -> Tensor:
        """The range of the weights that read each channel, with all factors so far, (C,)."""
        found = [
            gathered_max(self._input_range(reader.name), reader.channels, link.channels)
            for reader in link.readers
        ]
        return torch.stack(found).amax(0)

    def _input_range(self, name: str) -> Tensor:
        """The range of each input channel of a layer with all factors so far, (C_in,)."""
        inputs, outputs = self.rescaling.inputs.get(name), self.rescaling.outputs.get(name)
        weight = self.weights[name]
        if outputs is not None:
            weight = weight / outputs.float().unsqueeze(1)
        found = input_maxima(weight, self.groups[name]).double()
        return found if inputs is None else found * inputs


def _activation_range(link: Link, traced: fx.GraphModule, stats: ModelStats) -> Tensor | None:
    """The largest magnitude of each channel between two layers, (C,) float64; None if it was not measured."""
    name = link.passed[-1] if link.passed else link.first
    record = stats.layers[name].output if name in stats.layers else None
    return channel_magnitudes(record, link.channels)


def absorbed_constants(channel_min: Tensor, limit: Tensor | None = None) -> Tensor:
    """What can be taken off the channels of a ReLU's input that never gets to zero, (C,).

    Args:
        channel_min: the smallest value of each channel.
        limit: of a ReLU6.

    Example:
        >>> absorbed_constants(torch.tensor([-1.0, 0.5, 9.0]), torch.full((3,), 6.0)).tolist()
        [0.0, 0.5, 6.0]
    """
    found = torch.where(torch.isfinite(channel_min), channel_min, 0.0).clamp(min=0)
    return found if limit is None else torch.minimum(found, limit)


def _absorbed(
    traced: fx.GraphModule, links: list[Link], stats: ModelStats, totals: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """New layers with what is above zero for all images moved on, and why not for the others.

    The statistics are those before links were divided by totals.
    """
    shifts = Shifts(traced)
    new: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for link in links:
        if len(link.passed) != 1:
            continue  # nothing is gained where no ReLU cuts off the negative side
        record = stats.layers[link.first].output if link.first in stats.layers else None
        if record is None or record.channel_min is None or len(record.channel_min) != link.channels:
            left[link.first] = NO_CHANNELS
            continue
        (activation,) = link.passed
        module = traced.get_submodule(activation)
        limit = _limits(module, link)
        smallest = torch.from_numpy(record.channel_min.copy()).double() / totals[link.first]
        constants = absorbed_constants(smallest, limit)
        if not bool((constants > 0).any()):
            continue
        why = why_no_shift(link, traced)
        if why is not None:
            left[link.first] = f"its bias is not absorbed: {why}"
            continue
        shifts.subtract(link, constants)
        if limit is not None:
            shape = (-1, *[1] * (-link.axis - 1))
            new[activation] = CappedReLU6((limit - constants).reshape(shape).float())
    return new | {name: module for name, _, module in shifts.layers()}, left


def _limits(module: nn.Module, link: Link) -> Tensor | None:
    """The upper end of a ReLU6 for each channel, (C,) float64; None for other activations."""
    if module_op(module) != "relu6":
        return None
    found = limit_of(module)
    return torch.full((link.channels,), PLAIN_LIMIT).double() if found is None else found.double().flatten()
