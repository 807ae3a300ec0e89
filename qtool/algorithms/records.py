"""What a correction says of itself: which layers it changed, by how much, and which it left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LayerChange:
    """What a correction did to one layer.

    Args:
        name: of the layer.
        change: the size of the change relative to what was changed, ||new - old|| / ||old||.
        note: more, in words, or "".
    """

    name: str
    change: float
    note: str = ""


@dataclass(frozen=True)
class CorrectionReport:
    """What a correction did.

    Args:
        method: its name, as in the `corrections:` list.
        changed: the layers that it changed, in the order of execution.
        left: the layers that it would have changed but for a precondition that does not hold: name -> why.
    """

    method: str
    changed: tuple[LayerChange, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


def relative_change(new: Tensor, old: Tensor) -> float:
    """||new - old|| / ||old||; the norm of new where old is zero."""
    size = float(old.double().norm())
    return float((new.double() - old.double()).norm()) / (size if size else 1.0)
