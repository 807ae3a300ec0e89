"""Programs as files that torch.export.load reads without qtool, and back.

A file has an extra entry `qtool.json`: the format and its version, the SHA-256 of the program, and what the
caller adds. The quantize and dequantize operations are torch's; `import torch.ao.quantization.fx._decomposed`
defines them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.deploy.entries import check_entry
from qtool.errors import ModelError

FORMAT = "qtool-pt2e"
VERSION = 1
ENTRY = "qtool.json"
SUFFIX = ".pt2"
# What differs each time that the same program is written.
NOT_HASHED = ("extra/", ".data/serialization_id")


class ProgramNetwork(nn.Module):
    """A program from a file: it takes and gives float tensors on the CPU.

    Attributes:
        program: the graph, whose operations are torch's.
        info: the entry qtool.json.
    """

    def __init__(self, program: nn.Module, info: dict[str, Any]) -> None:
        super().__init__()
        # Not a submodule: an exported program has no training mode to be asked for.
        self._program = [program]
        self.info = info

    @property
    def program(self) -> nn.Module:
        """The graph as a module."""
        return self._program[0]

    def forward(self, x: Tensor) -> Any:
        return self.program(x)


def to_bytes(program: Any, info: dict[str, Any]) -> bytes:
    """The content of the file.

    Args:
        program: the torch.export.ExportedProgram; where its nodes came from is taken out of it.
        info: plain values: what the network is.
    """
    for node in program.graph.nodes:  # paths on this machine
        node.meta.pop("stack_trace", None)
    program.example_inputs = None
    bare = _saved(program, {})
    entry = {"format": FORMAT, "version": VERSION, "program_sha256": _sha256(BytesIO(bare)), **info}
    return _saved(program, {ENTRY: json.dumps(entry)})


def _saved(program: Any, extra: dict[str, str]) -> bytes:
    file = BytesIO()
    torch.export.save(program, file, extra_files=extra)
    return file.getvalue()


def _sha256(file: Any) -> str:
    """Of the names and contents of what makes the program, in the archive's order of names."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            inner = name.partition("/")[2]
            if not inner.startswith(NOT_HASHED):
                digest.update(inner.encode() + b"\0" + archive.read(name))
    return digest.hexdigest()


def is_program_file(path: Path) -> bool:
    """Whether a file is named as an exported program."""
    return path.suffix == SUFFIX and path.is_file()


def from_file(path: Path) -> tuple[ProgramNetwork, bool]:
    """Read a program; also whether it is the one that qtool wrote.

    Raises:
        ModelError: if the file is damaged, not of qtool, of another version, or no valid program.
    """
    import torch.ao.quantization.fx._decomposed  # defines the operations

    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(f"/extra/{ENTRY}")]
            entry = archive.read(names[0]) if names else None
        is_as_written = _sha256(path)
    except (OSError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ModelError(f"{path}: a damaged program: {error}; export it again") from error
    info = _info(path, entry)
    try:
        with _silent_loading():
            program = torch.export.load(path).module()
    except Exception as error:  # torch.export has no class for what it finds in a file
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{path}: a damaged program: {reason}; export it again") from error
    return ProgramNetwork(program, info).eval(), info.get("program_sha256") == is_as_written


def _info(path: Path, entry: bytes | None) -> dict[str, Any]:
    """What the file says of the network in it."""
    if entry is None:
        raise ModelError(f"{path}: has no entry {ENTRY!r}; programs that 'qtool export' wrote are read")
    try:
        info = json.loads(entry)
    except ValueError as error:
        raise ModelError(f"{path}: its entry {ENTRY!r} cannot be read; export the network again") from error
    return check_entry(path, repr(ENTRY), info, FORMAT, VERSION, "export the network again")


@contextmanager
def _silent_loading() -> Iterator[None]:
    """torch.export logs its own traceback of a damaged file; the error says it in one line."""
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
