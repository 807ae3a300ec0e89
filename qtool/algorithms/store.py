"""Where long methods keep what they have found for each layer, so that one that was ended can go on.

A method is deterministic: given the same results for the first layers it finds the same for the rest,
bit by bit. So it asks the store before it computes a layer, and tells it afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class LayerStore(Protocol):
    """Tensors under keys; an entry is there whole or not at all."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What was put under a key, None for nothing."""

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a key; an earlier entry is replaced."""


class MemoryStore:
    """Keeps its entries as long as it exists."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        return self._entries.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key] = {name: tensor.clone() for name, tensor in tensors.items()}
