"""The harm of rounding each group alone, for all groups in a constant number of passes.

The error that a quantized layer adds is measured at its output, exactly, on what it reads in the float
network. What becomes of it at the logits is taken to first order: with J the derivative of the logits by that
output, and e the error, the logits move by J e. For a random vector z of independent +1 and -1,

    E (z^T J e)^2 = |J e|^2,

and one backward pass from z gives z^T J for every layer and image at once. So a number of random
vectors that does not grow with the number of layers tells the noise of each at the logits; with z of the
covariance diag(p) - p p^T it tells twice the KL divergence of the predictions p, to second order.

The standard error of a noise power is about sqrt(2 / (images x vectors)) of it: 0.4 dB with 64 images and 2.
What the first order leaves out is in docs/sensitivity.md, measured.

Reference:
    Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qtool.graph.derivatives import random_signs, sums_of_images, values_for_derivatives
from qtool.numerics.logits import logits_of
from qtool.search.sensitivity.points import Plans, Point
from qtool.search.sensitivity.rounded import rounded_layers
from qtool.search.sensitivity.scores import KL, SQNR, Score

PROBES = 2
# Images that go through the network together: few, so that their activations stay in the processor's cache.
CHUNK = 8


class ErrorSource(Protocol):
    """Adds an error to the value of a node."""

    @property
    def end(self) -> fx.Node:
        """The node, in the float network."""

    def error(self, values: Mapping[fx.Node, Any]) -> Tensor:
        """What is added, in the shape of the value, given the float values of all nodes."""


def estimate(
    plans: Plans,
    points: Sequence[Point],
    images: Sequence[Tensor],
    metric: str = SQNR,
    seed: int = 0,
    probes: int = PROBES,
) -> list[Score]:
    """The harm that each group does alone.

    Args:
        plans: the network.
        points: of plans, or of others of the same network; in each, one group is quantized alone.
        images, metric, seed, probes: as for harm_of_errors.
    """
    network = plans.float_network()
    rounded = [rounded_layers(network, plans.folded.traced, point) for point in points]
    return harm_of_errors(network, rounded, images, metric, seed, probes)


def harm_of_errors(
    network: fx.GraphModule,
    sources: Sequence[Sequence[ErrorSource]],
    images: Sequence[Tensor],
    metric: str = SQNR,
    seed: int = 0,
    probes: int = PROBES,
) -> list[Score]:
    """The harm that errors inside a float network do to its logits, to first order.

    Args:
        network: gives logits.
        sources: groups of errors; those of one group are added together.
        images: batches of the network's input.
        metric: "sqnr", which gives the noise, or "kl".
        seed: of the random vectors.
        probes: how many of them.

    Returns:
        For each group a score with that metric.
    """
    if metric not in (SQNR, KL):
        raise ValueError(f"metric must be sqnr or kl, found {metric!r}")
    generator = torch.Generator().manual_seed(seed)
    ends = list(dict.fromkeys(source.end for group in sources for source in group))
    harm = torch.zeros(len(sources), dtype=torch.float64)
    signal, count = 0.0, 0
    for chunk in _chunks(images):
        values, output = values_for_derivatives(network, chunk, ends)
        with torch.enable_grad():
            logits = logits_of(output)
        signal += float(logits.detach().double().square().sum())
        count += len(chunk)
        detached = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        errors = [_errors(group, detached) for group in sources]
        for number in range(probes):
            z = _directions(logits.detach(), metric, generator)
            asked = [values[end] for end in ends]
            last = number == probes - 1
            found = torch.autograd.grad(logits, asked, z, retain_graph=not last, allow_unused=True)
            gradients = dict(zip(ends, found, strict=True))
            for place, group in enumerate(errors):
                harm[place] += _moved(group, gradients, len(chunk)).square().sum() / probes
    if metric == KL:
        return [Score(kl=float(total) / count / 2) for total in harm]
    return [Score(noise=float(total) / signal) for total in harm]


def _chunks(images: Sequence[Tensor]) -> Iterator[Tensor]:
    return (chunk for batch in images for chunk in torch.split(batch, CHUNK))


def _errors(group: Sequence[ErrorSource], values: dict[fx.Node, Any]) -> list[tuple[fx.Node, Tensor]]:
    with torch.no_grad():
        return [(layer.end, layer.error(values)) for layer in group]


def _directions(logits: Tensor, metric: str, generator: torch.Generator) -> Tensor:
    """Random vectors of the covariance that a metric asks for, (N, C)."""
    signs = random_signs(logits, generator)
    if metric == SQNR:
        return signs
    p = logits.softmax(1)
    spread = p.sqrt() * signs
    return spread - p * spread.sum(1, keepdim=True)


def _moved(
    errors: Sequence[tuple[fx.Node, Tensor]], gradients: Mapping[fx.Node, Tensor | None], images: int
) -> Tensor:
    """z^T J e of each image, (N,), or of all together, (1,), where they cannot be told apart."""
    parts = []
    for end, error in errors:
        gradient = gradients[end]
        if gradient is not None:
            parts.append(sums_of_images(gradient * error, end, images))
    if not parts:
        return torch.zeros(1, dtype=torch.float64)
    if any(len(part) == 1 for part in parts):
        parts = [part.sum(0, keepdim=True) for part in parts]
    return torch.stack(parts).sum(0)
