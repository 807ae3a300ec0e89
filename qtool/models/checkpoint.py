"""Checkpoint files: read without running code from them, and fit into a network or explained."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ModelError
from qtool.models.blueprint import one_line

# What a checkpoint of a quantized network, written by qtool, holds under "format".
QUANTIZED_FORMAT = "qtool-quantized"
# Where training programs keep the state_dict beside their other notes.
STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
# How many keys of each kind a message names.
KEYS_NAMED = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mismatch:
    """How the keys of a checkpoint differ from those of a network; all empty when it fits.

    Args:
        missing: keys that only the network has.
        unexpected: keys that only the checkpoint has.
        wrong_shape: (key, shape in the checkpoint, shape in the network).
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, Shape, Shape], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{key} {found} rather than {wanted}" for key, found, wanted in self.wrong_shape]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)]
        return ", ".join(f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in parts if keys)


def _few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:KEYS_NAMED]) + (", ..." if len(keys) > KEYS_NAMED else "")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what torch.save wrote, tensors on the CPU, without running code that the file may hold.

    Returns:
        The mapping that was saved: a state_dict, or one that holds it beside other things.

    Raises:
        ModelError: if the file is missing, empty, cut short, not torch's, needs classes to be
            unpickled, or holds something other than a mapping with names as keys.
    """
    _check_is_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of files from before torch 2
            content = torch.load(path, map_location="cpu", weights_only=True)
    # Given bytes that are not its own, torch.load raises whatever they lead to, KeyError included.
    except Exception as error:
        raise ModelError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ModelError(
            f"{path}: holds a {type(content).__name__}, not named tensors; save the network's state_dict()"
        )
    return content


def checkpoint_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits.

    Raises:
        ModelError: if the file cannot be read.
    """
    _check_is_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; name the checkpoint file in it")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path}: is empty; save or copy the checkpoint again")
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; correct --checkpoint") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)}); correct --checkpoint") from error


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    save_plain = "load it in the program that wrote it, and save its plain state_dict()"
    if wanted := re.search(r"unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", text, re.IGNORECASE):
        return f"needs the class {wanted[1]}, and so would run code of its own; {save_plain}"
    if "TorchScript" in text:
        return f"is a TorchScript program; {save_plain}"
    return "is no torch checkpoint, or is cut short; save it with torch.save, or copy it again"


def state_dict_of(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The named tensors in what read_checkpoint returned; a leading `module.` of all keys is dropped.

    Args:
        content: a state_dict, or a mapping that holds one as `state_dict`, `model` or `model_state_dict`.
        path: where it was read, for messages.

    Raises:
        ModelError: if there is none, if a tensor holds NaN or infinity, or if the checkpoint is of a
            network that qtool has quantized.
    """
    if content.get("format") == QUANTIZED_FORMAT:
        raise ModelError(f"{path}: is already quantized; use 'qtool evaluate --checkpoint {path}'")
    candidates = [content, *(content[key] for key in STATE_DICT_KEYS if key in content)]
    state = next((c for c in candidates if _is_state_dict(c)), None)
    if state is None:
        found = _few(list(content)) or "nothing"
        raise ModelError(f"{path}: no state_dict in it, found {found}; save the network's state_dict()")
    if all(key.startswith("module.") for key in state):  # nn.DataParallel adds it
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{path}: '{key}' holds NaN or infinity; save a checkpoint from before that")
    return state


def _is_state_dict(candidate: Any) -> bool:
    return (
        isinstance(candidate, dict)
        and len(candidate) > 0
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
    )


def compare_keys(model: nn.Module, state: dict[str, Tensor]) -> Mismatch:
    """How state differs from what model would save; counters of batch norm may be absent from state."""
    own: dict[str, Tensor] = model.state_dict()
    optional = {key for key in own if key.rpartition(".")[2] == "num_batches_tracked"}
    return Mismatch(
        missing=tuple(key for key in own if key not in state and key not in optional),
        unexpected=tuple(key for key in state if key not in own),
        wrong_shape=tuple(
            (key, tuple(state[key].shape), tuple(own[key].shape))
            for key in own
            if key in state and state[key].shape != own[key].shape
        ),
    )


def classes_of(mismatch: Mismatch, model: nn.Module) -> int | None:
    """The number of classes of a checkpoint that differs from model in nothing else.

    Returns:
        The rows of its classifier, which is the last layer that model saves; None if anything but
        that number differs.
    """
    if mismatch.missing or mismatch.unexpected or not mismatch.wrong_shape:
        return None
    classifier = list(model.state_dict())[-1].rpartition(".")[0]
    expected = {f"{classifier}.{kind}" for kind in ("weight", "bias")} & model.state_dict().keys()
    same_columns = all(found[1:] == wanted[1:] for _, found, wanted in mismatch.wrong_shape)
    rows = {found[0] for _, found, _ in mismatch.wrong_shape if found}
    if {key for key, _, _ in mismatch.wrong_shape} != expected or not same_columns or len(rows) != 1:
        return None
    return rows.pop()


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy into model a state that compare_keys found to fit."""
    complete = model.state_dict()  # has the counters that state may lack, and the layout version of today
    complete.update(state)
    model.load_state_dict(complete)
