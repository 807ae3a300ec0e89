"""Layer by layer, how the integers of two ways to run a quantized network differ.

A difference of one step at a tie, which is allowed, meets other values in the next layer and may
become one of several steps further on. So layers are compared in two ways: `alone`, where each is
given the simulation's integers, and in the network, where it is given what came out so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtool.deploy.native import NativeModel, integers
from qtool.deploy.native.containers import make_quantized
from qtool.deploy.native.lower import INT8
from qtool.quantizers.prepare import QuantizedModel

# Images whose integers are compared at a time.
CHUNK = 4


@dataclass(frozen=True)
class Difference:
    """How two tensors of integers differ.

    Args:
        largest: difference, in steps of the grid.
        equal: share of values without any, 0 to 1.
    """

    largest: int
    equal: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Difference:
        """Between two tensors of integers of one shape."""
        steps = (a - b).abs()
        return cls(int(steps.max()), float((steps == 0).double().mean()))

    @classmethod
    def over(cls, parts: Sequence[tuple[float, Difference]]) -> Difference:
        """Of parts of a batch, each with the share of images that it has."""
        equal = sum(share * part.equal for share, part in parts)
        return cls(max(part.largest for _, part in parts), min(1.0, equal))


@dataclass(frozen=True)
class LayerParity:
    """How one layer's integers differ.

    Args:
        runs: how the layer runs, a constant of qtool.deploy.native.
        alone: given the simulation's integers.
        in_network: given what the layers before it gave.
    """

    runs: str
    alone: Difference
    in_network: Difference


def parity(model: QuantizedModel, native: NativeModel, x: Tensor) -> dict[str, LayerParity]:
    """Compare a simulated network with its conversion on one batch, by layer name.

    Args:
        model: the simulation.
        native: what convert has made of it.
        x: an input batch; the integers of so many images as CHUNK are in memory at a time.
    """
    parts = [(len(part) / len(x), _parity_of(model, native, part)) for part in torch.split(x, CHUNK)]
    return {
        name: LayerParity(
            layer.runs,
            Difference.over([(share, part[name].alone) for share, part in parts]),
            Difference.over([(share, part[name].in_network) for share, part in parts]),
        )
        for name, layer in parts[0][1].items()
    }


def _parity_of(model: QuantizedModel, native: NativeModel, x: Tensor) -> dict[str, LayerParity]:
    expected = model.integers(x)
    found = integers(native, x)
    forced = _Forced(native, expected)
    with torch.no_grad():
        forced.run(x)
    return {
        name: LayerParity(
            native.layers[name].runs,
            Difference.of(forced.found[name], given),
            Difference.of(found[name], given),
        )
        for name, given in expected.items()
        if name in found
    }


def parity_text(layers: Mapping[str, LayerParity]) -> str:
    """The comparison in a few lines: of int8 kernels alone, and of the first and the worst layer."""
    kernels = {name: layer for name, layer in layers.items() if layer.runs == INT8}
    different = [name for name, layer in layers.items() if layer.in_network.largest]
    lines = []
    if kernels:
        largest = max(layer.alone.largest for layer in kernels.values())
        name, worst = min(kernels.items(), key=lambda item: item[1].alone.equal)
        lines.append(
            f"int8 kernels given the simulation's integers: {len(kernels)} layers, largest difference "
            f"{largest} steps, at least {_percent(worst.alone.equal)} of values equal ({name})"
        )
    if not different:
        return "\n".join([*lines, f"in the network: all integers of {len(layers)} layers equal"])
    name, worst = min(layers.items(), key=lambda item: item[1].in_network.equal)
    lines.append(
        f"in the network: first different layer {different[0]}; "
        f"largest difference {max(layer.in_network.largest for layer in layers.values())} steps, "
        f"at least {_percent(worst.in_network.equal)} of values equal ({name})"
    )
    return "\n".join(lines)


def _percent(share: float) -> str:
    """Rounded down, so that 99.999 % does not read as all of them."""
    return f"{int(share * 1e5) / 1e3:.3f} %"


class _Forced(fx.Interpreter):
    """Runs a converted network, notes what each layer gives, and goes on with the simulation's integers."""

    def __init__(self, native: NativeModel, expected: Mapping[str, Tensor]) -> None:
        super().__init__(native.network)
        self.native = native
        self.expected = expected
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = str(n.target)
        if n.op != "call_module" or name not in self.expected:
            return result
        output, layer = self.native.plan.layers[name].output, self.native.layers[name]
        assert output is not None
        if layer.container is None:
            self.found[name] = result.to(torch.int64) + int(output.zero_point)
            return self.expected[name].float() - float(output.zero_point)
        c = layer.container
        shift = int(output.zero_point) - c.zero_point
        self.found[name] = result.int_repr().to(torch.int64) + shift
        return make_quantized((self.expected[name] - shift).to(torch.uint8), c)
