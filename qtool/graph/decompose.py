"""Modules that hide their layers, replaced by ones whose layers can be traced.

Each stand-in computes the same numbers, up to the order of the additions. What has none stays one
opaque layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qtool.graph import transformer
from qtool.graph.attention import MultiheadAttention
from qtool.graph.recurrent import Recurrent


def _multihead_attention(module: nn.MultiheadAttention) -> nn.Module | None:
    if module.bias_k is not None or module.add_zero_attn:
        return None
    return MultiheadAttention(module)


# A class -> its stand-in, from the module; None if it has none.
STAND_INS: dict[type, Callable[[Any], nn.Module | None]] = {
    nn.MultiheadAttention: _multihead_attention,
    nn.LSTM: Recurrent,
    nn.GRU: Recurrent,
    nn.TransformerEncoderLayer: transformer.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: transformer.TransformerDecoderLayer,
    nn.TransformerEncoder: transformer.TransformerEncoder,
    nn.TransformerDecoder: transformer.TransformerDecoder,
    nn.Transformer: transformer.Transformer,
}


def decompose(root: nn.Module) -> nn.Module:
    """Replace what STAND_INS knows, in place, and give back the root, which may be one itself.

    Args:
        root: in evaluation mode.
    """
    for name, module in list(root.named_modules(remove_duplicate=False)):
        make = stand_in_of(module)
        replacement = None if make is None else make(module)
        if replacement is None:
            continue
        replacement.eval().requires_grad_(False)
        if name:
            root.set_submodule(name, replacement)
        else:
            root = replacement
    return root


def stand_in_of(module: nn.Module) -> Callable[[Any], nn.Module | None] | None:
    """What makes the stand-in of a module; a subclass with a forward of its own has none."""
    for base in type(module).__mro__:
        if base in STAND_INS:
            return STAND_INS[base] if type(module).forward is base.forward else None  # type: ignore[attr-defined]
    return None
