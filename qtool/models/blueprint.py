"""What is known about a network before it is built."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qtool.errors import ModelError
from qtool.models.archs import PreprocessingHint
from qtool.numerics.logits import logits_of


@dataclass(frozen=True)
class Blueprint:
    """How to build a network, and what it takes.

    Args:
        arch: its name, in its canonical spelling.
        build: makes the network with this many classes; None stands for its usual number.
        input_shape: (C, H, W) of one image; None when only the network itself may know.
        preprocessing: what its images go through; None when nothing is known.
        weights: where the weights come from that build gives it; None when they are random.
        resizable: whether build honours any number of classes.
    """

    arch: str
    build: Callable[[int | None], nn.Module]
    input_shape: tuple[int, ...] | None
    preprocessing: PreprocessingHint | None
    weights: str | None = None
    resizable: bool = True


def build_seeded(blueprint: Blueprint, num_classes: int | None, seed: int) -> nn.Module:
    """Build the network with weights drawn from seed; torch's own random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return blueprint.build(num_classes)


def check_runs(model: nn.Module, arch: str, input_shape: tuple[int, ...]) -> None:
    """Run the network on one image of zeros.

    Args:
        model: in eval mode, on the CPU.
        arch: its name, for messages.
        input_shape: (C, H, W) of one image.

    Raises:
        ModelError: if it refuses input_shape, or gives no logits (N, classes), see numerics.logits.
    """
    shape = (1, *input_shape)
    try:
        with torch.no_grad():
            y = model(torch.zeros(shape))
    # What a forward pass raises on the wrong shape is up to its author.
    except Exception as error:
        raise ModelError(
            f"{arch}: does not run on an input of shape {shape} ({one_line(error)}); correct --input-shape"
        ) from error
    try:
        logits_of(y)
    except ValueError as error:
        raise ModelError(f"{arch}: for one image it {error}") from error


def one_line(error: BaseException, max_chars: int = 200) -> str:
    """Type and message of an error, without line breaks.

    Example:
        >>> one_line(ValueError("two\\nlines"))
        'ValueError: two lines'
    """
    message = " ".join(str(error).split())
    if len(message) > max_chars:
        message = message[: max_chars - 3] + "..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
