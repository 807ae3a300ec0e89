"""Derivatives of what a network gives by values inside it, for random directions of its outputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from qtool.graph.examples import placeholder_values


class _Recording(fx.Interpreter):
    """Runs a network and cuts nothing, with the values of some nodes as what derivatives are taken by."""

    def __init__(self, network: fx.GraphModule, ends: Collection[fx.Node]) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.ends = ends

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.ends and not value.requires_grad:
            value = value.detach().requires_grad_(True)  # nothing in front of it needs derivatives
        return value


def values_for_derivatives(
    network: fx.GraphModule, images: Tensor, ends: Collection[fx.Node]
) -> tuple[dict[fx.Node, Any], Any]:
    """The value of every node, and what the network gives, which has derivatives by the values of ends."""
    interpreter = _Recording(network, frozenset(ends))
    with torch.enable_grad():
        output = interpreter.run(*placeholder_values(network, images), enable_io_processing=False)
    return interpreter.env, network.graph.process_outputs(output)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1, in the shape and dtype of a tensor, on its device."""
    return torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1


def sums_of_images(product: Tensor, node: fx.Node, images: int) -> Tensor:
    """The sum of each image's entries, (N,); of all, (1,), where it cannot be told which are whose.

    The axis of the images is the one that differs from the example that the network was traced with, in
    windows of an image by a multiple. A sum over all is as right on average, as the signs of images are
    independent, and varies more.

    Args:
        product: of a derivative and an error, in the shape of a node's value.
        node: of the network.
        images: N.
    """
    example = node.meta["value"].shape
    grown = [axis for axis, size in enumerate(product.shape) if size != example[axis]]
    if len(grown) != 1 or product.shape[grown[0]] % images:
        return product.sum().double().reshape(1)
    others = [axis for axis in range(product.dim()) if axis != grown[0]]
    each = product.sum(others) if others else product  # without a copy in another order in memory
    return each.double().reshape(images, -1).sum(1)
