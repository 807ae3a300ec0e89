"""Whether a pass that is to leave the network's function alone has done so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qtool.errors import ModelError
from qtool.graph.examples import call
from qtool.graph.trace import float_tensors

# How far outputs may move, relative to the largest one: a hundred times the rounding of float32.
TOLERANCE = 1e-4


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors relative to the largest magnitude of the first.

    Example:
        >>> largest_difference(torch.tensor([4.0, -8.0]), torch.tensor([4.0, -6.0]))
        0.25
    """
    if not a.numel():
        return 0.0
    difference = float((a.double() - b.double()).abs().max())
    size = float(a.double().abs().max())
    return difference / size if difference and size else difference


def check_unchanged(before: fx.GraphModule, after: fx.GraphModule, example: Any) -> float:
    """How far two networks are apart on one batch.

    Args:
        before, after: the network, and what a pass made of it.
        example: an input batch.

    Returns:
        The largest difference of an output, relative to the largest output in magnitude.

    Raises:
        ModelError: if it is more than TOLERANCE, or cannot be told as the network gives NaN or infinity.
    """
    with torch.no_grad():
        expected, found = float_tensors(call(before, example)), float_tensors(call(after, example))
    if not all(bool(torch.isfinite(x).all()) for x in expected):
        raise ModelError(
            "the network gives NaN or infinity in float, so that no correction of it can be checked; "
            "check the weights and the images"
        )
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        difference = largest_difference(a, b)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"a correction that is to leave the float network as it is has changed its output by "
                f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}; leave that correction out"
            )
        largest = max(largest, difference)
    return largest
