"""Modules that hide their layers, replaced by ones whose layers can be traced.

Each stand-in computes the same numbers, up to the order of the additions. What has none stays one
opaque layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qtool.graph.attention import MultiheadAttention
from qtool.graph.recurrent import Recurrent


def _multihead_attention(module: nn.MultiheadAttention, _length: int | None) -> nn.Module | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    return MultiheadAttention(module)


def _recurrent(module: nn.RNNBase, length: int | None) -> nn.Module | None:
    return Recurrent(module, length) if length else None


# A class -> its stand-in, from the module and the length of its sequences; None if it has none.
STAND_INS: dict[type, Callable[[Any, int | None], nn.Module | None]] = {
    nn.MultiheadAttention: _multihead_attention,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
}


def decompose(root: nn.Module, lengths: Mapping[str, int]) -> nn.Module:
    """Replace what STAND_INS knows, in place, and give back the root, which may be one itself.

    Args:
        root: in evaluation mode.
        lengths: number of steps of the sequences that a module takes, by its name.
    """
    for name, module in list(root.named_modules(remove_duplicate=False)):
        make = stand_in_of(module)
        replacement = None if make is None else make(module, lengths.get(name))
        if replacement is None:
            continue
        replacement.eval().requires_grad_(False)
        if not name:
            return replacement
        root.set_submodule(name, replacement)
    return root


def stand_in_of(module: nn.Module) -> Callable[[Any, int | None], nn.Module | None] | None:
    """What makes the stand-in of a module; a subclass with a forward of its own has none."""
    for base in type(module).__mro__:
        if base in STAND_INS:
            return STAND_INS[base] if type(module).forward is base.forward else None  # type: ignore[attr-defined]
    return None
