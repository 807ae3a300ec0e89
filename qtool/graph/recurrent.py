"""nn.LSTM and nn.GRU as layers that torch.fx can trace: linear layers, sums, products, gates.

The input goes through one linear layer for all steps; each step has its own hidden layer, gates and
sums. A trace holds as many steps as the example had.

Reference:
    the equations in torch's documentation of nn.LSTM and nn.GRU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.graph.attention import linear


def take_steps(x: Tensor, count: int, axis: int) -> tuple[Tensor, ...]:
    """The steps of a sequence that must have count of them, each without axis.

    Raises:
        ModelError: if it has another number.
    """
    if torch.overrides.has_torch_function_unary(x):
        result: tuple[Tensor, ...] = torch.overrides.handle_torch_function(take_steps, (x,), x, count, axis)
        return result
    if x.shape[axis] != count:
        raise ModelError(
            f"the network was traced with sequences of {count} steps, and found one of {x.shape[axis]}; "
            "pad or cut the sequences to one length, or trace with an example of that length"
        )
    return x.unbind(axis)


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

    def forward(
        self, x: Tensor, state: Sequence[Tensor], length: int, axis: int
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The output of each step, in the order of the sequence, and the last state."""
        steps = take_steps(self.input(x), length, axis)
        outputs: list[Any] = [None] * length
        for index in reversed(range(length)) if self.backwards else range(length):
            state = self.cell(steps[index], state)
            outputs[index] = state[0]
        return outputs, state


_CELLS: dict[str, Any] = {"LSTM": LSTMCell, "GRU": GRUCell}


class Recurrent(nn.Module):
    """What nn.LSTM or nn.GRU computes on sequences of one length, made of layers.

    Layer k is `layers.k.0`, and `layers.k.1` backwards; each has a linear layer `input` and a `cell`
    with a linear layer `hidden`.

    Args:
        source: the module to stand in for; its parameters are shared.
        length: steps of a sequence.
    """

    def __init__(self, source: nn.RNNBase, length: int) -> None:
        super().__init__()
        self.length = length
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
        """As nn.LSTM and nn.GRU, for a batch of sequences of equal length."""
        x, axis = input, 1 if self.batch_first else 0
        given = None if hx is None else (hx if len(self.state_sizes) == 2 else (hx,))
        last: list[Sequence[Tensor]] = []
        for directions in self.layers:
            outputs = []
            for layer in directions:  # type: ignore[attr-defined]
                state = self._zeros(x, axis) if given is None else [s[len(last)] for s in given]
                steps, state = layer(x, state, self.length, axis)
                outputs.append(torch.stack(steps, axis))
                last.append(state)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x, (states if len(states) == 2 else states[0])

    def _zeros(self, x: Tensor, axis: int) -> list[Tensor]:
        batch = x.shape[1 - axis]
        return [x.new_zeros(batch, size) for size in self.state_sizes]
