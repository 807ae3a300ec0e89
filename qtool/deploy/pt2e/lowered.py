"""A program on x86's int8 kernels, by way of torchao and torch.compile."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.compiled import reason_of
from qtool.errors import ConfigError

# What torch.compile counts.
KERNELS = ("qconv", "qlinear")
PIP = "pip install 'qtool[pt2e]'"


class LoweredNetwork(nn.Module):
    """A program that was lowered for batches of one size: others are cut, and filled up with zeros.

    Args:
        program: takes a batch of that size.
        size: the number of images.
    """

    def __init__(self, program: Any, size: int) -> None:
        super().__init__()
        self._program = [program]
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for part in torch.split(x, self.size):
            lacking = self.size - len(part)
            whole = torch.cat([part, part.new_zeros(lacking, *part.shape[1:])]) if lacking else part
            parts.append(self._program[0](whole)[: len(part)])
        return torch.cat(parts)


def load_lowering() -> None:
    """Have torchao tell torch.compile which quantize and dequantize operations make an int8 kernel.

    Raises:
        ConfigError: if it is not installed, with the command that installs it.
    """
    try:
        # Its import enters the patterns.
        importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    except ImportError as error:
        raise ConfigError(f"--lower: needs torchao, which is not installed; {PIP}") from error


def int8_operations() -> int:
    """How many int8 kernels torch.compile has put into programs since the process began."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return sum(n for key, n in found.items() if key.startswith(KERNELS) and key.endswith("_lower_count"))


def lowered(program: nn.Module, example: Tensor) -> LoweredNetwork:
    """The program on int8 kernels.

    Args:
        program: the module of an exported program.
        example: a batch of the size that it is to run on.

    Raises:
        ConfigError: if torchao is missing, or no C++ compiler works, or the program is refused.
    """
    load_lowering()
    inductor: Any = torch._inductor.config
    try:
        # Weights are packed when the program is compiled, if they are constants.
        with torch.no_grad(), inductor.patch(freezing=True):
            network = LoweredNetwork(torch.compile(program), len(example)).eval()
            network(example)
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--lower: the program cannot be lowered: {reason_of(error)}") from error
    return network
