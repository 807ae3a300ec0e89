"""A quantized network on torch's own int8 kernels, with qtool's scales, zero points and integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.native.lower import IN_FLOAT, INT8, SIMULATED, NativeLayer, lower
from qtool.deploy.native.target import BACKENDS, Target, no_deprecation_warnings, supported_backends
from qtool.errors import ConfigError
from qtool.quantizers.prepare import QuantizedModel

__all__ = [
    "BACKENDS",
    "INT8",
    "IN_FLOAT",
    "SIMULATED",
    "NativeLayer",
    "NativeModel",
    "Target",
    "convert",
    "supported_backends",
]


class NativeModel(nn.Module):
    """A network on int8 kernels: it takes and gives float tensors on the CPU.

    Attributes:
        network: the graph; every layer keeps its name.
        layers: what became of each.
        target: where it runs.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        layers: Mapping[str, NativeLayer],
        source: QuantizedModel,
        target: Target,
    ) -> None:
        super().__init__()
        self.network = network
        self.layers = layers
        self.plan = source.plan
        self.target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> NativeModel:
        """Refuse training: integers have no gradients."""
        if mode:
            raise RuntimeError("a converted network is for evaluation only")
        return super().train(False)


def convert(
    model: QuantizedModel, target: Target | None = None, flag: str = "--qe-convert-pytorch"
) -> NativeModel:
    """Turn a quantized network into one on torch's int8 kernels; the given one stays as it was.

    Weights are the stored integers, never quantized again, so it does not matter whether the network
    has run. What no kernel gives exactly runs as in the simulation.

    Args:
        model: a network that was quantized with static ranges.
        target: where it is to run; None is the x86 engine on this machine.
        flag: that asks for it, for messages.

    Raises:
        ConfigError: if its grids are found at run time, or if no layer would run on an int8 kernel.
    """
    target = target or Target.here()
    if model.plan.dynamic:
        raise ConfigError(
            f"{flag}: int8 kernels need grids that are known beforehand, and --qe-dynamic finds "
            "them batch by batch; leave out one of the two"
        )
    with no_deprecation_warnings(), torch.no_grad():
        network, layers = lower(model, target)
    if not any(layer.runs == INT8 for layer in layers.values()):
        name, why = next(((n, layer.why) for n, layer in layers.items() if layer.why), ("", ""))
        because = f"; layer {name!r}: {why}" if why else ""
        raise ConfigError(f"{flag}: no layer would run on an int8 kernel{because}")
    return NativeModel(network, layers, model, target).eval()


def integers(model: NativeModel, x: Tensor) -> dict[str, Tensor]:
    """The integers x_q that every layer on a grid gives for an input batch, by layer name."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.layers.items():
        output = model.plan.layers[name].output
        if output is None:
            continue
        shift = int(output.zero_point) - (0 if layer.container is None else layer.container.zero_point)

        def note(_m: nn.Module, _a: Any, y: Tensor, name: str = name, shift: int = shift) -> None:
            found[name] = (y.int_repr() if y.is_quantized else y).to(torch.int64) + shift

        handles.append(model.network.get_submodule(name).register_forward_hook(note))
    try:
        with torch.no_grad():
            model.network(x)
    finally:
        for handle in handles:
            handle.remove()
    return found
