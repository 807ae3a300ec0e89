"""Channel alignment: the channels between two convolutions centered, and of one width.

Between two layers without an activation nothing says where the values of a channel lie. Moved by their
middle and divided by their width relative to the median one, all channels fill one grid alike, and the
second layer makes up for both. Quantiles of each image say what middle and width are.

Reference:
    NNCF's ChannelAlignment; exact in float.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.algorithms.links import Link, Rescaling, Shifts, changes, find_links, range_ratio, why_no_shift
from qtool.algorithms.records import CorrectionReport
from qtool.errors import DataError
from qtool.graph.edit import replace_layers
from qtool.graph.examples import call
from qtool.graph.fold import Folded
from qtool.graph.ops import module_op
from qtool.observers.stats import ModelStats

METHOD = "channel_alignment"
# A width below this is none: the rounding of float32 around 1.
NO_WIDTH = 1.19e-7


@dataclass(frozen=True)
class ChannelAlignmentSettings:
    """How to align.

    Args:
        quantile: share of an image's values that is beyond either end of its channel's range.
        limit: no channel is multiplied or divided by more than this.

    Raises:
        ValueError: if one is out of its range.
    """

    quantile: float = 1e-4
    limit: float = 100.0

    def __post_init__(self) -> None:
        if not 0 <= self.quantile < 0.5:
            raise ValueError(f"quantile must be at least 0 and less than 0.5, found {self.quantile}")
        if not self.limit > 1:
            raise ValueError(f"limit must be more than 1, found {self.limit}")


def image_quantiles(x: Tensor, quantile: float) -> Tensor:
    """The ends of each channel's range in each image.

    Args:
        x: (N, C, ...).
        quantile: share of the values beyond either end.

    Returns:
        (2, N, C): the lower ends, and the upper ends.

    Example:
        >>> image_quantiles(torch.tensor([[[1.0, 5.0, 3.0]]]), 0.0).flatten().tolist()
        [1.0, 5.0]
    """
    rows = x.float().reshape(*x.shape[:2], -1)
    return torch.quantile(rows, torch.tensor([quantile, 1 - quantile]).to(rows), dim=2)


def alignment(low: Tensor, high: Tensor, limit: float = 100.0) -> tuple[Tensor, Tensor]:
    """What to subtract from channels, and then to divide them by.

    Args:
        low, high: the ends of their ranges, (C,).
        limit: of the factors, and of their reciprocals.

    Returns:
        The middles of the ranges, and their widths relative to the median width, 1 where there is none; (C,).

    Example:
        >>> middle, s = alignment(torch.tensor([0.0, -1.0, 2.0]), torch.tensor([2.0, 3.0, 2.0]))
        >>> middle.tolist(), [round(v, 4) for v in s.tolist()]
        ([1.0, 1.0, 2.0], [0.6667, 1.3333, 1.0])
    """
    width = high - low
    wide = width > NO_WIDTH
    if not bool(wide.any()):
        return (low + high) / 2, torch.ones_like(width)
    median = torch.quantile(width[wide], 0.5)
    return (low + high) / 2, torch.where(wide, (width / median).clamp(1 / limit, limit), 1.0)


def align_channels(
    folded: Folded,
    stats: ModelStats,
    *,
    layers: Collection[str],
    settings: ChannelAlignmentSettings | None = None,
    batches: Sequence[Any],
) -> tuple[Folded, CorrectionReport]:
    """Align the channels between layers without an activation between them; the float function stays.

    Args:
        folded: the network, batch norms folded; it stays as it was.
        stats: not needed; as for the other passes.
        layers: the names of the layers that may be changed.
        settings: None for the defaults.
        batches: images, as the network takes them; their ranges are measured.

    Returns:
        The new network, and which layers were changed by how much, or left alone and why.

    Raises:
        DataError: if there are no images.
    """
    settings = settings or ChannelAlignmentSettings()
    if not batches:
        raise DataError("channel_alignment: no images to measure channels with; give it calibration images")
    traced = folded.traced
    links, left = find_links(traced, layers)
    links = [link for link in links if not link.passed]
    reasons = {link.first: _why_not(link, traced) for link in links}
    left |= {name: why for name, why in reasons.items() if why is not None}
    links = [link for link in links if reasons[link.first] is None]
    shifts, rescaling, notes = Shifts(traced), Rescaling(traced), dict[str, str]()
    for link, found in zip(links, _measured(traced, links, batches, settings.quantile), strict=True):
        low, high = torch.quantile(found.double(), 0.5, dim=1)  # the median of all images
        if not bool(torch.isfinite(low + high).all()):
            left[link.first] = "its output holds NaN or infinity"
            continue
        middle, factors = alignment(low, high, settings.limit)
        shifts.subtract(link, middle)
        rescaling.divide(link, factors)
        widths = [range_ratio(width) for width in (high - low, (high - low) / factors)]
        notes[link.first] = (
            f"largest over smallest range of its output's channels {widths[0]:.3g} -> {widths[1]:.3g}"
        )
    moved = replace_layers(traced, {name: module for name, _, module in shifts.layers()})
    scaling = Rescaling(moved, rescaling.outputs, rescaling.inputs)
    new = replace_layers(moved, {name: module for name, _, module in scaling.layers()})
    return Folded(new, folded.pairs), CorrectionReport(METHOD, changes(traced, new, notes), left)


def _why_not(link: Link, traced: fx.GraphModule) -> str | None:
    for reader in link.readers:
        module: Any = traced.get_submodule(reader.name)
        if module_op(module) == "linear":
            continue
        plain = module.groups == 1 and {*module.stride, *module.dilation} == {1}
        if module_op(module) != "conv" or not plain:
            return f"{reader.name!r} has groups, a stride or a dilation"
    return why_no_shift(link, traced)


def _measured(
    traced: fx.GraphModule, links: Sequence[Link], batches: Sequence[Any], quantile: float
) -> list[Tensor]:
    """The ends of each link's channels in each image, (2, images, C)."""
    found: dict[str, list[Tensor]] = {link.first: [] for link in links}
    handles = []
    for link in links:

        def watch(_module: nn.Module, _args: Any, output: Tensor, link: Link = link) -> None:
            channels_second = output.movedim(link.axis, 1) if output.dim() > 1 else output.unsqueeze(0)
            found[link.first].append(image_quantiles(channels_second, quantile).cpu())

        handles.append(traced.get_submodule(link.first).register_forward_hook(watch))
    try:
        with torch.no_grad():
            for batch in batches if links else ():
                call(traced, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts, 1) for parts in found.values()]
