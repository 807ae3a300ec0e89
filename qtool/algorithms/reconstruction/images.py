"""What a block reads in both networks and what it is to give, image by image, without copies of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.numerics.affine import dequantize_centered
from qtool.numerics.spec import QParams

# An image: the number of its batch, and its own in that.
Place = tuple[int, int]


@dataclass(frozen=True)
class BlockImages:
    """The values of all images at a block's entry and exit; most tensors are those of the walks.

    Args:
        read: what it reads in the quantized network, per batch.
        grid: of which these are the centered integers, None for float values.
        floats: what it reads in the float network.
        targets: what it gives there, behind the activation that the quantized block computes.
    """

    read: Sequence[Tensor]
    grid: QParams | None
    floats: Sequence[Tensor]
    targets: Sequence[Tensor]

    def pick(self, places: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """What some images are read as, in the quantized and in the float network, and the targets."""
        read, floats, targets = (
            torch.stack([values[b][i] for b, i in places])
            for values in (self.read, self.floats, self.targets)
        )
        return self._values(read), floats, targets

    def divided(self, held_out: float) -> tuple[list[Place], list[Place]]:
        """The images to learn from and those to judge by, which are spread evenly over all.

        Args:
            held_out: share of the latter; where that is no image, or is all, both are all.
        """
        places = [(b, i) for b, batch in enumerate(self.read) for i in range(len(batch))]
        count = round(held_out * len(places))
        if not 0 < count < len(places):
            return places, places
        judges = {number * len(places) // count for number in range(count)}
        learn = [place for number, place in enumerate(places) if number not in judges]
        return learn, [places[number] for number in sorted(judges)]

    def _values(self, read: Tensor) -> Tensor:
        return read if self.grid is None else dequantize_centered(read, self.grid)
