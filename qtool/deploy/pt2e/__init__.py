"""Networks as torch.export programs, with quantize and dequantize operations at qtool's own grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qtool.deploy.pt2e.lower import lower
from qtool.errors import ConfigError
from qtool.quantizers.prepare import QuantizedModel

__all__ = ["PT2E", "reference", "to_program"]

PT2E = "pt2e"


def reference(model: QuantizedModel) -> fx.GraphModule:
    """A quantized network that computes in float between quantize and dequantize operations.

    Args:
        model: quantized with static ranges.

    Raises:
        ConfigError: if its grids are found at run time, or a layer has no such form.
    """
    if model.plan.dynamic:
        raise ConfigError(
            f"--format {PT2E}: quantize operations need grids that are known beforehand, and --qe-dynamic "
            "finds them batch by batch; quantize without it"
        )
    return lower(model, f"--format {PT2E}")


def to_program(network: fx.GraphModule, example: Tensor) -> Any:
    """The torch.export.ExportedProgram of a network from reference; its number of images is free.

    Args:
        network: takes one tensor of images.
        example: a batch of two or more.

    Raises:
        ConfigError: if it cannot be exported.
    """
    sizes = {0: torch.export.Dim("N", min=1)}
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=(sizes,))
    except (RuntimeError, TypeError, ValueError) as error:  # torch.export has no class for all of them
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--format {PT2E}: torch.export refuses the network: {reason}") from error
