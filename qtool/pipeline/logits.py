"""The logits that a network gives, or why it gives none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from qtool.errors import ModelError
from qtool.numerics import logits


def logits_of(output: Any) -> Tensor:
    """The tensor (N, classes) in a network's output, see numerics.logits.

    Raises:
        ModelError: if there is none.
    """
    try:
        return logits.logits_of(output)
    except ValueError as error:
        raise ModelError(f"the network {error}") from error


def outputs_of(graph: fx.Graph) -> int:
    """How many classes a traced network tells apart."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    return int(logits_of(output.meta["value"]).shape[1])
