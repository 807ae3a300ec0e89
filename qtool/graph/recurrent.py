"""nn.LSTM and nn.GRU as layers that torch.fx can trace: linear layers, sums, products, gates.

The input goes through one linear layer for all steps at once. The hidden layer, the gates and the sums
of a step stand in the trace once, in a loop (graph/control.py): all steps share their grids, and a
sequence may have any length.

Reference:
    the equations in torch's documentation of nn.LSTM and nn.GRU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.graph.attention import linear
from qtool.graph.control import begin_steps, carry, end_steps, keep, last_kept


def as_batch(x: Tensor, dims: int, batch_axis: int) -> Tensor:
    """A batch of one for a single sequence or state, which has one dimension less than dims."""
    if torch.overrides.has_torch_function_unary(x):
        result: Tensor = torch.overrides.handle_torch_function(as_batch, (x,), x, dims, batch_axis)
        return result
    return x if x.dim() == dims else x.unsqueeze(batch_axis)


def as_given(x: Tensor, given: Tensor, batch_axis: int) -> Tensor:
    """The inverse of as_batch for a result, where the input was a single sequence, (L, H_in)."""
    if torch.overrides.has_torch_function((x, given)):
        result: Tensor = torch.overrides.handle_torch_function(as_given, (x, given), x, given, batch_axis)
        return result
    return x if given.dim() == 3 else x.squeeze(batch_axis)


class LSTMCell(nn.Module):
    """One step of an LSTM layer; the gates are in the order input, forget, cell, output.

    Args:
        hidden: from the state (N, H_out) to four gates.
        project: from (N, H) to (N, H_out), or None.
    """

    def __init__(self, hidden: nn.Linear, project: nn.Linear | None) -> None:
        super().__init__()
        self.hidden = hidden
        self.project = project

    def forward(self, gates: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The next output and cell, from what the input adds to the gates, (N, 4 * H)."""
        h, c = state
        i, f, g, o = (gates + self.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if self.project is None else self.project(h)), c


class GRUCell(nn.Module):
    """One step of a GRU layer; the gates are in the order reset, update, new."""

    def __init__(self, hidden: nn.Linear, _project: None) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, gates: Tensor, state: Sequence[Tensor]) -> tuple[Tensor]:
        """The next state, from what the input adds to the gates, (N, 3 * H)."""
        (h,) = state
        r, z, n = gates.chunk(3, -1)
        r_h, z_h, n_h = self.hidden(h).chunk(3, -1)
        n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
        return (n + torch.sigmoid(z + z_h) * (h - n),)


class RecurrentLayer(nn.Module):
    """One layer in one direction.

    Args:
        source: the module whose parameters are shared.
        suffix: of the names of its parameters, such as "_l0_reverse".
    """

    def __init__(self, source: nn.RNNBase, suffix: str) -> None:
        super().__init__()
        weights = [getattr(source, f"weight_{part}{suffix}") for part in ("ih", "hh")]
        biases = [getattr(source, f"bias_{part}{suffix}") if source.bias else None for part in ("ih", "hh")]
        self.input = linear(weights[0], biases[0])
        projected = f"weight_hr{suffix}"
        project = linear(getattr(source, projected), None) if source.proj_size else None
        self.cell = _CELLS[source.mode](linear(weights[1], biases[1]), project)
        self.backwards = suffix.endswith("_reverse")

    def forward(self, x: Tensor, state: Sequence[Tensor], axis: int) -> tuple[Tensor, Sequence[Tensor]]:
        """The outputs of all steps, in the order of the sequence, and the last state."""
        gates = self.input(x)
        step = begin_steps(gates, axis, self.backwards)
        names = ("h", "c")[: len(state)]
        before = [carry(step, part, name) for part, name in zip(state, names, strict=True)]
        after = [keep(step, v, name) for v, name in zip(self.cell(step, before), names, strict=True)]
        outputs = end_steps(step, after[0], gates, axis)
        return outputs, [last_kept(outputs, v, name) for v, name in zip(after, names, strict=True)]


_CELLS: dict[str, Any] = {"LSTM": LSTMCell, "GRU": GRUCell}


class Recurrent(nn.Module):
    """What nn.LSTM or nn.GRU computes on sequences of any length, made of layers.

    Layer k is `layers.k.0`, and `layers.k.1` backwards; each has a linear layer `input` and a `cell`
    with a linear layer `hidden`.

    Args:
        source: the module to stand in for; its parameters are shared.
    """

    def __init__(self, source: nn.RNNBase) -> None:
        super().__init__()
        self.batch_first = source.batch_first
        self.state_sizes = [source.proj_size or source.hidden_size]
        if source.mode == "LSTM":
            self.state_sizes.append(source.hidden_size)
        directions = ("", "_reverse") if source.bidirectional else ("",)
        self.layers = nn.ModuleList(
            nn.ModuleList(RecurrentLayer(source, f"_l{k}{d}") for d in directions)
            for k in range(source.num_layers)
        )

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """As nn.LSTM and nn.GRU, for a batch of sequences of equal length, or a single one."""
        axis = 1 if self.batch_first else 0
        x = as_batch(input, 3, 1 - axis)
        given = self._initial(x, hx, axis)
        last: list[Sequence[Tensor]] = []
        for directions in self.layers:
            outputs = []
            for layer in directions:  # type: ignore[attr-defined]
                state = [part if hx is None else part[len(last)] for part in given]
                steps, state = layer(x, state, axis)
                outputs.append(steps)
                last.append(state)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        states = tuple(as_given(torch.stack(parts), input, 1) for parts in zip(*last, strict=True))
        return as_given(x, input, 1 - axis), (states if len(states) == 2 else states[0])

    def _initial(self, x: Tensor, hx: Any, axis: int) -> list[Tensor]:
        """The states of all layers, (layers, N, H) each, or zeros for one, (N, H)."""
        if hx is None:
            return [x.new_zeros(x.shape[1 - axis], size) for size in self.state_sizes]
        parts = (hx[0], hx[1]) if len(self.state_sizes) == 2 else (hx,)
        return [as_batch(part, 3, 1) for part in parts]
