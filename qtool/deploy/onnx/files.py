"""Exported networks as files, and back.

An ONNX file of qtool has an entry `qtool` in its metadata: JSON with the format and its version, the
SHA-256 of its graph, what became of each layer, and what the caller adds.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qtool.deploy.entries import check_entry
from qtool.deploy.onnx.extra import load_extra
from qtool.deploy.onnx.session import OnnxNetwork
from qtool.errors import ModelError

FORMAT = "qtool-onnx"
VERSION = 1
ENTRY = "qtool"


def to_bytes(proto: Any, info: dict[str, Any]) -> bytes:
    """The content of the file.

    Args:
        proto: the onnx.ModelProto.
        info: plain values: what the network is.
    """
    entry = proto.metadata_props.add()
    entry.key = ENTRY
    entry.value = json.dumps(
        {"format": FORMAT, "version": VERSION, "graph_sha256": _graph_sha256(proto), **info}
    )
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _graph_sha256(proto: Any) -> str:
    return hashlib.sha256(proto.graph.SerializeToString(deterministic=True)).hexdigest()


def is_onnx_file(path: Path) -> bool:
    """Whether a file is named as an ONNX model."""
    return path.suffix == ".onnx" and path.is_file()


def from_file(path: Path) -> tuple[OnnxNetwork, bool]:
    """Read an exported network; also whether its graph is the one that qtool wrote.

    Raises:
        ConfigError: if onnx or onnxruntime is not installed.
        ModelError: if the file is damaged, not of qtool, of another version, or no valid network.
    """
    onnx = load_extra("onnx", str(path))
    try:
        content = path.read_bytes()
        proto = onnx.load_from_string(content)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's own errors have no public class
        raise ModelError(f"{path}: not an ONNX model: {_reason(error)}; export it again") from error
    info = _info(path, proto)
    try:
        onnx.checker.check_model(proto)
        network = OnnxNetwork(content, info=info).eval()
    except Exception as error:  # onnxruntime has a class for every kind of trouble
        if "pip install" in str(error):
            raise
        raise ModelError(f"{path}: a damaged ONNX model: {_reason(error)}; export it again") from error
    return network, info.get("graph_sha256") == _graph_sha256(proto)


def _info(path: Path, proto: Any) -> dict[str, Any]:
    """What the file says of the network in it."""
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        info = json.loads(entries[ENTRY])
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{path}: has no entry {ENTRY!r} in its metadata; ONNX models that 'qtool export' wrote are read"
        ) from error
    return check_entry(path, repr(ENTRY), info, FORMAT, VERSION, "export the network again")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
