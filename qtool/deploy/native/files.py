"""A converted network as a file that torch loads without qtool.

A TorchScript program, as torch.jit.load reads it, with one entry more, `qtool.json`: the format and
its version, the engine, what became of each layer, and what the caller adds. Weights are packed again
by whichever engine is in force when the file is loaded; what would be wrong on another engine is
stored in a form that names its kernel.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtool.deploy.entries import check_entry
from qtool.deploy.native import NativeModel
from qtool.deploy.native.kernels import Conv, PinnedConv
from qtool.deploy.native.portable import unpack
from qtool.deploy.native.target import engine, no_deprecation_warnings, supported_backends
from qtool.errors import ModelError
from qtool.graph.trace import copy_graph

FORMAT = "qtool-native"
VERSION = 1
ENTRY = "qtool.json"


def to_file(native: NativeModel, example: Tensor, **info: Any) -> bytes:
    """The content of the file.

    Args:
        native: the converted network.
        example: an input batch of two or more.
        info: plain values to find the architecture again.

    Raises:
        ModelError: if the program computes something else than the network, or for one batch size only.
    """
    with no_deprecation_warnings(), torch.no_grad():
        program = torch.jit.trace(_portable(native.network), example, check_trace=False)  # type: ignore[no-untyped-call]
        unpack(program)
        program = torch.jit.freeze(program.eval())
        content = {
            "format": FORMAT,
            "version": VERSION,
            "backend": native.target.backend,
            "layers": {name: asdict(layer) for name, layer in native.layers.items()},
            "model": info,
        }
        file = BytesIO()
        torch.jit.save(program, file, _extra_files={ENTRY: json.dumps(content)})
        _check_same(native, file.getvalue(), example)
    return file.getvalue()


def _portable(network: fx.GraphModule) -> fx.GraphModule:
    """The network with layers that give the same on every engine.

    A convolution in front of such a layer, which it alone reads, comes along if it runs on the same kernel:
    plain integers then go from one to the other, and are not copied out of a quantized tensor.
    """
    copied = copy_graph(network)
    modules = dict(network.named_modules())
    for node in copied.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, PinnedConv):
            continue
        (source,) = node.all_input_nodes
        before = modules.get(str(source.target)) if source.op == "call_module" else None
        joined = type(before) is Conv and before.on_onednn and list(source.users) == [node]
        if joined:
            assert isinstance(before, Conv)
            copied.set_submodule(str(source.target), before.portable(gives_integers=True))
        copied.set_submodule(str(node.target), module.portable(takes_integers=joined))
    return copied


def _check_same(native: NativeModel, content: bytes, example: Tensor) -> None:
    """The program is to give what the network gives, for another number of images too."""
    with engine(native.target.backend):
        program = torch.jit.load(BytesIO(content))  # type: ignore[no-untyped-call]
    for batch in (example, example[:1]):
        try:
            same = torch.equal(program(batch), native(batch))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-160:]
            raise ModelError(f"the converted network cannot be saved: {reason}") from error
        if not same:
            raise ModelError(
                "the converted network cannot be saved: as a program it gives something else for a batch of "
                f"{len(batch)}"
            )


def is_native_file(path: Path) -> bool:
    """Whether a file is a converted network of qtool."""
    return _entry_name(path) is not None


def _entry_name(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return next((n for n in archive.namelist() if n.endswith(f"/extra/{ENTRY}")), None)
    except (OSError, zipfile.BadZipFile):
        return None


class LoadedNative(nn.Module):
    """A converted network from a file.

    Attributes:
        info: the entry qtool.json.
    """

    def __init__(self, program: Any, info: dict[str, Any]) -> None:
        super().__init__()
        # Not a submodule: a frozen program has no parameters, and no training mode to be asked for.
        self._program = [program]
        self.info = info

    def forward(self, x: Tensor) -> Any:
        return self._program[0](x)


def from_file(path: Path) -> LoadedNative:
    """Read a converted network; its weights are packed for the engine that it was made for.

    Raises:
        ModelError: if the file is damaged, of another version, or made for an engine this build lacks.
    """
    info = _read_info(path)
    backend = info.get("backend")
    if backend not in supported_backends():
        has = ", ".join(supported_backends()) or "none"
        raise ModelError(
            f"{path}: was made for the engine {backend!r}, which this build of torch lacks; convert the "
            f"network again for one that it has: {has}"
        )
    try:
        with no_deprecation_warnings(), engine(backend):
            program = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(f"{path}: a damaged converted network: {reason}; convert it again") from error
    return LoadedNative(program, info).eval()


def _read_info(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            info = json.loads(archive.read(_entry_name(path) or ENTRY))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ModelError(f"{path}: a damaged converted network: {error}; convert it again") from error
    return check_entry(path, ENTRY, info, FORMAT, VERSION, "convert the network again")
