"""Where what a layer gives is read: behind its ReLU, and behind the residual sum that it goes into.

Equal means in front of a ReLU are not equal behind it: noise alone raises the mean of what is left. So
what the next layers read is looked at, with the other operand of a sum as both networks have it by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qtool.graph.capped import PLAIN_LIMIT, limit_of
from qtool.graph.neighbours import readers, source_of
from qtool.graph.trace import tensor_inputs
from qtool.quantizers.lockstep import Lockstep
from qtool.quantizers.plan import WEIGHTED

# Newton steps, with bisection where they leave the bracket.
STEPS = 30
# A mean that is off by less, in standard deviations, is not off.
TOLERANCE = 1e-5
# Elements of a layer's output that are looked at.
MOST = 1 << 22


@dataclass(frozen=True)
class ReadPoint:
    """What happens to a layer's output before others read it.

    Attributes:
        add: the layer that adds another value, None for none.
        operand: the place of that other value among the sum's inputs.
        high: the end of the ReLU behind it, infinite for a plain one, (C, 1) or (); None for no ReLU.
    """

    add: str | None = None
    operand: int = 0
    high: Tensor | None = None


def read_point(lockstep: Lockstep, name: str) -> ReadPoint:
    """Where a layer's output is read; both networks stand in front of it.

    A sum whose other operand is not there yet, as layers with weights have to run first, is not looked
    behind: the last of its layers does that.
    """
    node = lockstep.node(name)
    add, operand = None, 0
    following = readers(node)
    if len(following) == 1 and following[0].meta["op"] == "add" and "layer" in following[0].meta:
        other = _other_operand(following[0], node)
        if other is None or not _is_ready(lockstep, other[1]):
            return ReadPoint()
        add, operand = following[0].meta["layer"], other[0]
        following = readers(following[0])
    return ReadPoint(add, operand, _upper_end(lockstep, following))


def _upper_end(lockstep: Lockstep, following: list[fx.Node]) -> Tensor | None:
    """The end of the ReLU or ReLU6 that alone reads a value; None for none."""
    if len(following) != 1 or following[0].meta["op"] not in ("relu", "relu6"):
        return None
    if following[0].meta["op"] == "relu":
        return torch.tensor(math.inf)
    layer = following[0].meta.get("layer")
    limit = limit_of(lockstep.reference.get_submodule(layer)) if layer is not None else None
    return torch.tensor(PLAIN_LIMIT) if limit is None else limit.reshape(-1, 1)


def _other_operand(add: fx.Node, node: fx.Node) -> tuple[int, fx.Node] | None:
    """The value that is added to a node's, and its place; None where the sum is another one than x + y."""
    operands = tensor_inputs(add)
    if add.kwargs or len(operands) != 2 or len(add.args) != 2:
        return None
    others = [(i, source) for i, source in enumerate(operands) if source_of(source) is not node]
    if len(others) != 1 or others[0][1].meta["value"].shape != node.meta["value"].shape:
        return None
    return others[0]


def _is_ready(lockstep: Lockstep, node: fx.Node) -> bool:
    """Whether no layer with weights has to run before a value is there."""
    if lockstep.float_walk.has_run(node):
        return True
    if node.meta["op"] in WEIGHTED:
        return False
    return all(_is_ready(lockstep, source) for source in node.all_input_nodes)


class Sampler:
    """Takes the same elements of each channel out of batches, however images came in batches.

    Args:
        channel_axis: from the end.
        total: elements of all batches.
    """

    def __init__(self, channel_axis: int, total: int) -> None:
        self._axis = channel_axis
        self._total = total
        self._seen = 0
        self._stride = 0

    def take(self, y: Tensor) -> Tensor:
        """(C, E), of a batch of outputs."""
        rows = y.movedim(self._axis, 0).flatten(1)
        if not self._stride:
            positions = math.prod(y.shape[self._axis + 1 :]) if self._axis < -1 else 1
            # Without a common divisor with the size of an image, positions differ from image to image.
            self._stride = max(1, math.ceil(self._total / MOST))
            while math.gcd(self._stride, positions) > 1:
                self._stride += 1
        start = -self._seen % self._stride
        self._seen += rows.shape[1]
        return rows[:, start :: self._stride]


def shift_behind(values: Tensor, wanted: Tensor, high: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """By how much to shift values so that their mean behind a ReLU is the wanted one.

    Args:
        values: (C, E), in front of the ReLU.
        wanted: (C,), float64, means behind it.
        high: the ReLU's upper end, (C, 1) or (), may be infinite.
        bound: (C,), float64, the largest shift; its thousandth part is not needed exactly.

    Returns:
        The shifts, (C,), float64, and whether each solves it.

    Example:
        >>> values = torch.tensor([[-1.0, 0.0, 1.0]])
        >>> wanted, bound = torch.tensor([2 / 3]).double(), torch.tensor([5.0]).double()
        >>> shift, solved = shift_behind(values, wanted, torch.tensor(torch.inf), bound)
        >>> round(float(shift), 4), bool(solved)
        (0.5, True)
    """
    shift, low, up = torch.zeros_like(wanted), -bound, bound.clone()
    for _ in range(STEPS):
        error, slope = _off(values, shift, wanted, high)
        solved = error.abs() <= TOLERANCE * bound
        if bool(solved.all()):
            break
        up, low = torch.where(error > 0, shift, up), torch.where(error < 0, shift, low)
        newton = shift - error / slope
        inside = (newton > low) & (newton < up)
        shift = torch.where(solved, shift, torch.where(inside, newton, (low + up) / 2))
    return shift, solved


def _off(values: Tensor, shift: Tensor, wanted: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the mean behind the ReLU is too high, and how it rises with the shift."""
    moved = values + shift.float()[:, None]
    clipped = torch.minimum(moved.clamp(min=0), high)
    slope = ((moved > 0) & (moved < high)).mean(dim=1, dtype=torch.float64)
    return clipped.mean(dim=1, dtype=torch.float64) - wanted, slope


def operands(lockstep: Lockstep, point: ReadPoint, quantized: bool) -> Iterator[Tensor | None]:
    """The other operand of the sum that a layer goes into, for each batch; None for ever without a sum."""
    if point.add is None:
        while True:
            yield None
    elif quantized:
        yield from lockstep.quant_operand(point.add, point.operand)
    else:
        yield from lockstep.float_walk.ahead(tensor_inputs(lockstep.node(point.add))[point.operand])
