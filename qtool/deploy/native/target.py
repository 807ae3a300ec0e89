"""Where a converted network is to run: one of torch's int8 engines, on this machine's processor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qtool.errors import ConfigError, nearest

BACKENDS = ("x86", "fbgemm", "onednn", "qnnpack")


@dataclass(frozen=True)
class Target:
    """An engine and what its arithmetic can do.

    Args:
        backend: one of BACKENDS.
        vnni: whether the processor adds up products of 8-bit integers in 32 bits. Without it the x86
            kernels add pairs of products in 16 bits, which saturate; qnnpack's never do.
        as_simulated: whether convolutions and linear layers run on oneDNN's kernels wherever those take
            them: they round as the simulation does, and the engine x86 hands some to fbgemm, which adds
            the bias before it multiplies.

    Raises:
        ConfigError: if this build of torch lacks the engine.
    """

    backend: str
    vnni: bool
    as_simulated: bool = False

    def __post_init__(self) -> None:
        if self.backend not in supported_backends():
            has = ", ".join(supported_backends()) or "none"
            raise ConfigError(
                f"--qe-pytorch-backend: this build of torch lacks {self.backend!r}"
                f"{nearest(self.backend, supported_backends())}; it has {has}"
            )

    @classmethod
    def here(cls, backend: str = "x86") -> Target:
        """An engine on this machine."""
        return cls(backend, has_vnni())

    @property
    def saturates(self) -> bool:
        """Whether sums of pairs of products may be cut off at 16 bits, in every kernel."""
        return not self.vnni and self.backend != "qnnpack"


def supported_backends() -> list[str]:
    """The engines that this build of torch has."""
    return [name for name in BACKENDS if name in torch.backends.quantized.supported_engines]


def has_vnni() -> bool:
    """Whether the processor has the 8-bit dot products of AVX512-VNNI or AVX-VNNI."""
    return bool(torch.cpu._is_vnni_supported())


@contextmanager
def engine(backend: str) -> Iterator[None]:
    """Make an engine the one that packs weights, and put the former one back."""
    former = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        yield
    finally:
        torch.backends.quantized.engine = former


@contextmanager
def no_deprecation_warnings() -> Iterator[None]:
    """torch warns that its quantized tensors and TorchScript will go; qtool's users cannot act on that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        _let_torch_warn()
        yield


def _let_torch_warn() -> None:
    """Provoke what torch says once in a process, where nobody hears it: a program says it to stderr."""
    make: Any = torch
    integers, one, zero = torch.zeros(1, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    make._make_per_tensor_quantized_tensor(integers, 1.0, 0)
    make._make_per_channel_quantized_tensor(integers, one, zero, 0)
    torch.quantize_per_tensor(one, 1.0, 0, torch.quint8)
