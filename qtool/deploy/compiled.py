"""A simulated network through torch.compile, where the machine has a C++ compiler and gives the same.

torch's compiler makes one loop of the passes over a layer's accumulator. It keeps the order of operations
and contracts none (`-ffp-contract=off`), so integers stay what they are; that is tried out on images
before a compiled network is taken.
"""

from __future__ import annotations

import subprocess
from typing import Any

import torch
from torch import Tensor, nn

from qtool.quantizers.prepare import QuantizedModel

# A batch whose first dimension may differ from call to call; torch makes programs for 1 apart.
LEAST_IMAGES = 2


class CompiledModel(nn.Module):
    """A network whose program was made for batches of any number of images from LEAST_IMAGES on.

    Args:
        network: what is compiled; it runs what the program is not for.
        images: an input batch.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.network = network
        sizes = {0: torch.export.Dim("N", min=LEAST_IMAGES)}
        graph = network.network if isinstance(network, QuantizedModel) else network
        # One graph, whatever Python runs between the layers.
        exported = torch.export.export(graph, (images,), dynamic_shapes=(sizes,))
        self._program: Any = [torch.compile(exported.module())]

    def forward(self, x: Tensor) -> Any:
        return self.network(x) if len(x) < LEAST_IMAGES else self._program[0](x)


def compiled(network: nn.Module, images: Tensor) -> tuple[nn.Module, str]:
    """The compiled network, or the network itself with the reason.

    Args:
        network: in evaluation mode, on the device of the images.
        images: an input batch on which both are to give the same to the last bit.

    Returns:
        What is to run, and why it is not compiled, or "".
    """
    if isinstance(network, QuantizedModel) and network.plan.per_sample:
        return network, "ranges of each image alone are found image by image"
    if len(images) < LEAST_IMAGES:
        return network, f"programs are made for batches of {LEAST_IMAGES} images and more"
    try:
        with torch.no_grad():
            found = CompiledModel(network, images).eval()
            given = found(images)
    except (RuntimeError, OSError, TypeError, ValueError, subprocess.SubprocessError) as error:
        return network, reason_of(error)
    with torch.no_grad():
        wanted = network(images)
    if not (isinstance(given, Tensor) and torch.equal(given, wanted)):
        return network, "compiled it gives other values than the simulation, as layers in float may"
    return found, ""


def reason_of(error: BaseException) -> str:
    """What torch.compile found missing or wrong, in one line."""
    text = str(error)
    if "C++ compiler" in text or isinstance(error, FileNotFoundError):
        return "no C++ compiler that works was found; install one, such as g++, or name it in CXX"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"torch.compile: {(lines or [type(error).__name__])[0][:160]}"
