"""What evaluates a quantized network: the simulation, or torch's int8 kernels on the same integers.

Both give the integers of the network's grids. int8 kernels take the grids of 8 bits and fewer, whatever the
number of bits of weights and activations; layers that they cannot give exactly run as in the simulation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qtool.deploy.native import INT8 as ON_KERNEL
from qtool.deploy.native import NativeModel, Target, convert, supported_backends
from qtool.deploy.native.target import has_vnni
from qtool.deploy.native.trial import LARGEST_DIFFERENCE, SHARE_EQUAL
from qtool.deploy.parity import parity
from qtool.errors import ConfigError
from qtool.graph.macs import count_macs
from qtool.quantizers.prepare import QuantizedModel

SIMULATE, INT8, AUTO = "simulate", "int8", "auto"
# `auto` takes int8 kernels if they do so much of the multiply-accumulates; with less there is little to gain.
LEAST_WORK = 0.5


@dataclass(frozen=True)
class Engine:
    """What evaluates a quantized network.

    Args:
        name: SIMULATE or INT8.
        network: takes and gives float tensors.
        why: it was taken, in words, or "" where it was asked for.
        native: the network on int8 kernels, if there is one, taken or not.
        work: share of the multiply-accumulates that run on int8 kernels there, 0 to 1.
        compiled: whether the simulation went through torch.compile.
    """

    name: str
    network: nn.Module
    why: str = ""
    native: NativeModel | None = None
    work: float = 0.0
    compiled: bool = False


def evaluator(model: QuantizedModel, engine: str = AUTO, images: Tensor | None = None) -> nn.Module:
    """The network that evaluates a quantized one: choose_engine(...).network.

    Example:
        >>> import torch, qtool
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(8, 4)
        >>> model = qtool.quantize(net, qtool.calibrate(net, [x]))
        >>> type(evaluator(model, "simulate")).__name__, type(evaluator(model, "int8")).__name__
        ('QuantizedModel', 'NativeModel')
    """
    return choose_engine(model, engine, images).network


def choose_engine(model: QuantizedModel, asked: str, images: Tensor | None = None) -> Engine:
    """What evaluates a quantized network.

    Args:
        model: the simulation, on the CPU if int8 kernels are to be had.
        asked: `simulate`; `int8`; or `auto`, which takes int8 kernels where grids are known beforehand, most
            of the work runs on them, and every layer gives the simulation's integers within the tolerance.
        images: an input batch on which `auto` compares the layers; without it, every layer has only been
            compared on random integers.

    Raises:
        ConfigError: if int8 kernels are asked for, and cannot be had.
        ValueError: if there is no such engine.
    """
    if asked not in (SIMULATE, INT8, AUTO):
        raise ValueError(f"engine must be one of {SIMULATE}, {INT8}, {AUTO}, found {asked!r}")
    if asked == SIMULATE:
        return Engine(SIMULATE, model)
    if asked == INT8:
        native = _converted(model)
        return Engine(INT8, native, native=native, work=work_on_kernels(model, native))
    try:
        native = _converted(model)
    except ConfigError as error:
        return Engine(SIMULATE, model, str(error).partition(": ")[2])
    work = work_on_kernels(model, native)
    objection = _objection(model, native, work, images)
    if objection:
        return Engine(SIMULATE, model, objection, native, work)
    why = f"int8 kernels do {_percent(work)} of the multiply-accumulates, within the tolerance"
    return Engine(INT8, native, why, native, work)


def _converted(model: QuantizedModel) -> NativeModel:
    device = next((t.device.type for t in model.buffers()), "cpu")
    if device != "cpu":
        raise ConfigError(f"--engine {INT8}: torch's int8 kernels run on the CPU, not on {device}")
    backends = supported_backends()
    if not backends:
        raise ConfigError(f"--engine {INT8}: this build of torch has no int8 kernels; --engine {SIMULATE}")
    as_simulated = "onednn" in backends
    return convert(model, Target(backends[0], has_vnni(), as_simulated), flag=f"--engine {INT8}")


def work_on_kernels(model: QuantizedModel, native: NativeModel) -> float:
    """The share of a network's multiply-accumulates that run on int8 kernels, 0 to 1."""
    macs = count_macs(model.network)
    total = sum(work.count for work in macs.values())
    done = sum(work.count for name, work in macs.items() if native.layers[name].runs == ON_KERNEL)
    return done / total if total else 1.0


def _objection(model: QuantizedModel, native: NativeModel, work: float, images: Tensor | None) -> str:
    """Why int8 kernels are not worth taking, or ""."""
    if work < LEAST_WORK:
        return f"int8 kernels would do {_percent(work)} of the multiply-accumulates only"
    for name, layer in {} if images is None else parity(model, native, images).items():
        alone = layer.alone
        if layer.runs == ON_KERNEL and (alone.largest > LARGEST_DIFFERENCE or alone.equal < SHARE_EQUAL):
            return (
                f"layer {name!r} would differ by up to {alone.largest} steps, {_percent(alone.equal)} equal"
            )
    return ""


def _percent(share: float) -> str:
    """Rounded down, so that 99.99 % does not read as all of it."""
    return f"{int(share * 1000) / 10:.1f} %"
