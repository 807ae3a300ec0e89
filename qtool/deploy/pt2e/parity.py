"""Layer by layer, how the integers of a program's network differ from qtool's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.parity import CHUNK, Difference
from qtool.deploy.pt2e.modules import OnGrid
from qtool.quantizers.prepare import QuantizedModel


def program_parity(model: QuantizedModel, network: fx.GraphModule, x: Tensor) -> dict[str, Difference]:
    """Compare on one batch, by layer name.

    Args:
        model: the simulation.
        network: what reference has made of it.
        x: an input batch; the integers of so many images as CHUNK are in memory at a time.
    """
    parts: dict[str, list[tuple[float, Difference]]] = {}
    for chunk in torch.split(x, CHUNK):
        found = _integers(network, chunk)
        for name, expected in model.integers(chunk).items():
            if name in found:
                difference = Difference.of(found[name], expected)
                parts.setdefault(name, []).append((len(chunk) / len(x), difference))
    return {name: Difference.over(given) for name, given in parts.items()}


def _integers(network: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    """The integers that every layer on a grid gives, by layer name."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in network.named_modules():
        grid = getattr(module, "output", None)
        if not isinstance(grid, OnGrid):
            continue

        def note(_m: nn.Module, _a: Any, y: Tensor, name: str = name, grid: OnGrid = grid) -> None:
            found[name] = grid.integers(y)

        handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found
