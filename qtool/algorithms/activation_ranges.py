"""Ranges of activations by what their errors do to the network's outputs.

Errors of one size can change what the network gives by far more in one tensor than in another, and those
of clipping by more or less than those of rounding. To first order an error dx of a tensor changes the
outputs by J dx. For a vector r of random signs |J dx|^2 is the mean of (r J dx)^2, and J^T r is found for
all tensors by one run of the float network backward.

Reference:
    Hutchinson 1990, Communications in Statistics 19(2), for the random signs. Yuan et al. 2022,
    arXiv:2111.12293 (PTQ4ViT), choose scales by squared gradients of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from qtool.algorithms.bias_correction import NOT_FINITE, STEERED
from qtool.algorithms.reconstruction import first_images
from qtool.algorithms.records import CorrectionReport, LayerChange
from qtool.graph.control import is_steered
from qtool.graph.derivatives import random_signs, sums_of_images, values_for_derivatives
from qtool.graph.fold import Folded
from qtool.graph.neighbours import following_op
from qtool.graph.trace import float_tensors
from qtool.graph.trace import layers as traced_layers
from qtool.numerics.affine import fake_quantize
from qtool.numerics.spec import QParams
from qtool.quantizers.adjust import adjusted
from qtool.quantizers.plan import FAKE, INTEGER, ModelPlan
from qtool.quantizers.plan.derived import hands_on_grid, value_grids

METHOD = "activation_ranges"
# What ranges are multiplied by: 0.5 to 1.41 in eighths of an octave.
FACTORS = tuple(2 ** (k / 8) for k in range(-8, 5))
SAME = FACTORS.index(1.0)
# Images that go through the network together, whatever the batches.
CHUNK = 16


@dataclass(frozen=True)
class ActivationRangesSettings:
    """How ranges are chosen.

    Args:
        images: at most so many are looked at.
        probes: vectors of random signs for each image.
        own: share of a tensor's own mean squared error in what is minimized, from 0 to 1. Errors at the
            outputs are known from few images, and to first order only.
        seed: of the signs.

    Raises:
        ValueError: if one is out of its range.
    """

    images: int = 128
    probes: int = 2
    own: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, smallest in (("images", 1), ("probes", 1), ("seed", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, found {getattr(self, name)}")
        if not 0 <= self.own <= 1:
            raise ValueError(f"own must be from 0 to 1, found {self.own}")


@dataclass
class Site:
    """A layer's output on a grid of its own.

    Args:
        node: of the float network, that gives its values behind the activation that the layer computes.
        grid: that it has.

    Attributes:
        at_outputs: for each of FACTORS, the summed squared error at the network's outputs, float64.
        of_its_own: the same of the tensor itself.
    """

    node: fx.Node
    grid: QParams

    at_outputs: Tensor = field(default_factory=lambda: torch.zeros(len(FACTORS), dtype=torch.float64))
    of_its_own: Tensor = field(default_factory=lambda: torch.zeros(len(FACTORS), dtype=torch.float64))

    def add(self, x: Tensor, gradients: Sequence[Tensor], images: int) -> None:
        """Count the errors of some images.

        Args:
            x: the values.
            gradients: for each vector of signs, of x's shape.
            images: how many there are.
        """
        for number, factor in enumerate(FACTORS):
            error = fake_quantize(x, replace(self.grid, scale=self.grid.scale * factor)) - x
            self.of_its_own[number] += error.square().sum(dtype=torch.float64)
            for gradient in gradients:
                self.at_outputs[number] += sums_of_images(gradient * error, self.node, images).square().sum()

    def best(self, own: float) -> int:
        """The number of the best factor; SAME where there is nothing to choose by."""
        shares = ((1 - own, self.at_outputs), (own, self.of_its_own))
        parts = [share * errors / errors[SAME] for share, errors in shares if errors[SAME] > 0]
        return int(torch.stack(parts).sum(0).argmin()) if parts else SAME


def activation_ranges(
    reference: fx.GraphModule,
    folded: Folded,
    plan: ModelPlan,
    batches: Sequence[Tensor],
    *,
    layers: Collection[str],
    settings: ActivationRangesSettings | None = None,
) -> tuple[Folded, ModelPlan, CorrectionReport]:
    """Multiply the ranges of outputs by the factors that cost the network's outputs least.

    Costs a run of the float network forward, `probes` backward, and 13 roundings of every tensor, for
    `images` images.

    Args:
        reference: the float network, batch norms folded, whose outputs are wanted.
        folded: the one that the plan quantizes; it stays as it is.
        plan: static, of folded.
        batches: images.
        layers: the names of the layers whose outputs may get other ranges.
        settings: None for the defaults.

    Returns:
        The network, the plan with other grids of outputs, and what was changed.

    Raises:
        ValueError: if the plan is dynamic.
    """
    settings = settings or ActivationRangesSettings()
    if plan.dynamic:
        raise ValueError("the plan is dynamic: its grids are other ones for each batch; give a static one")
    sites = _sites(reference, plan, layers)
    if is_steered(reference.graph):
        return folded, plan, CorrectionReport(METHOD, (), dict.fromkeys(sites, STEERED))
    _measure(reference, batches, list(sites.values()), settings)
    new, changed, left = {}, [], {}
    for name, site in sites.items():
        if not bool(torch.isfinite(site.at_outputs + site.of_its_own).all()):
            left[name] = NOT_FINITE
            continue
        best = site.best(settings.own)
        if best == SAME:
            continue
        new[name] = replace(site.grid, scale=site.grid.scale * FACTORS[best])
        changed.append(LayerChange(name, abs(FACTORS[best] - 1), _note(site, best)))
    return folded, adjusted(folded.traced, plan, outputs=new), CorrectionReport(METHOD, tuple(changed), left)


def _note(site: Site, best: int) -> str:
    before, after = float(site.at_outputs[SAME]), float(site.at_outputs[best])
    said = f"its range times {FACTORS[best]:.2f}"
    if before > 0 and after > 0:
        said += f", its error at the network's outputs {10 * math.log10(after / before):+.1f} dB"
    return said


def _sites(reference: fx.GraphModule, plan: ModelPlan, names: Collection[str]) -> dict[str, Site]:
    """The outputs whose ranges can be chosen, by layer; those handed on are chosen where they come from."""
    left_out = hands_on_grid(value_grids(reference, plan.layers), plan.layers)
    found = {}
    for name, node, _ in traced_layers(reference):
        layer = plan.layers[name]
        if name not in names or name in left_out or layer.kind not in (INTEGER, FAKE) or layer.output is None:
            continue
        following = following_op(node) if layer.activation is not None else None
        computed = node if following is None or following[0] != layer.activation else following[1]
        found[name] = Site(computed, layer.output)
    return found


def _measure(
    reference: fx.GraphModule,
    batches: Sequence[Tensor],
    sites: list[Site],
    settings: ActivationRangesSettings,
) -> None:
    """Count the errors of all sites."""
    signs = torch.Generator().manual_seed(settings.seed)
    ends = [site.node for site in sites]
    for images in torch.split(torch.cat(first_images(batches, settings.images)), CHUNK):
        values, output = values_for_derivatives(reference, images, ends)
        outputs = [y for y in float_tensors(output) if y.requires_grad]
        gradients = []
        for _ in range(settings.probes if outputs else 0):
            r = [random_signs(y.detach(), signs) for y in outputs]
            asked = [values[end] for end in ends]
            gradients.append(torch.autograd.grad(outputs, asked, r, retain_graph=True, allow_unused=True))
        for site, *found in zip(sites, *gradients, strict=True):
            known = [gradient for gradient in found if gradient is not None]
            site.add(values[site.node].detach(), known, len(images))
