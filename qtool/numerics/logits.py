"""The logits in what a network gives: a tensor, or a tuple, mapping or dataclass that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

# What libraries call them: transformers, and torchvision's segmentation and detection networks.
NAMES = ("logits", "out")


def logits_of(output: Any) -> Tensor:
    """The tensor (N, classes) of a network's output.

    Args:
        output: that tensor; or a tuple or list whose first entry it is; or a mapping, named tuple or
            dataclass that calls it `logits` or `out`, or holds nothing else.

    Raises:
        ValueError: if there is none; says what was found and what would be right.

    Example:
        >>> import torch
        >>> logits_of({"features": torch.zeros(2, 8), "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    found = _named(output)
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise ValueError(
            f"gives {_describe(output)}; qtool evaluates classifiers, which give logits of shape "
            "(N, classes): alone, first in a tuple, or named 'logits' or 'out'"
        )
    return found


def _named(output: Any) -> Any:
    if isinstance(output, Mapping):
        named = [output[name] for name in NAMES if name in output]
        return next(iter(named or (output.values() if len(output) == 1 else ())), None)
    named = [getattr(output, name) for name in NAMES if hasattr(output, name)]
    if named and (is_dataclass(output) or isinstance(output, tuple)):
        return named[0]
    return output[0] if isinstance(output, (tuple, list)) and len(output) else output


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with {', '.join(repr(key) for key in output) or 'nothing in it'}"
    if isinstance(output, (tuple, list)):
        first = f", the first {_describe(output[0])}" if len(output) else ""
        return f"a {type(output).__name__} of {len(output)}{first}"
    return f"a {type(output).__name__}"
