"""A folder that keeps what a long method has found for each layer, so that one that was ended can go on."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ConfigError
from qtool.quantizers.plan import ModelPlan
from qtool.run_dir import write_whole

FORMAT = 1


class LayerFiles:
    """A LayerStore of one file per key, each written whole; tensors come back bit by bit.

    Args:
        folder: made when something is put.
        inputs: a fingerprint of all that the results depend on, see fingerprint_of; entries with
            another one are as if they were not there, and are replaced.
    """

    def __init__(self, folder: Path, inputs: str) -> None:
        self.folder = folder
        self.inputs = inputs

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors of a key; None if there are none, or they are of other inputs.

        Raises:
            ConfigError: if the file is none that put has written.
        """
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            # Nothing in the file is executed.
            entry = torch.load(path, map_location="cpu", weights_only=True)
            known = entry["format"] == FORMAT and entry["inputs"] == self.inputs and entry["key"] == key
            tensors: dict[str, Tensor] = dict(entry["tensors"])
        except (
            OSError,
            RuntimeError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            raise ConfigError(
                f"{path}: is no result of a layer; delete it, and the layer is computed anew"
            ) from error
        return tensors if known else None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a key.

        Raises:
            OutputError: if the file cannot be written.
        """
        entry = {"format": FORMAT, "inputs": self.inputs, "key": key, "tensors": dict(tensors)}
        write_whole(self._path(key), lambda file: torch.save(entry, file))

    def _path(self, key: str) -> Path:
        # Names of layers are no names of files: they may be long, or differ in their case only.
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pt"


def fingerprint_of(
    settings: Mapping[str, Any], networks: Sequence[nn.Module], plan: ModelPlan, batches: Sequence[Tensor]
) -> str:
    """A hash of what a method's results depend on.

    Args:
        settings: of the methods in front of it and its own, as plain values, in order.
        networks: float ones; their parameters and buffers count.
        plan: that it starts from; all grids and integers count.
        batches: the images, and how they are divided.
    """
    found = hashlib.sha256()
    found.update(f"{torch.__version__} {torch.get_num_threads()} {settings!r}".encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            _add(found, name, tensor)
    for name, layer in plan.layers.items():
        found.update(name.encode())
        for field, value in sorted(vars(layer).items()):
            _add_value(found, field, value)
    for batch in batches:
        _add(found, "batch", batch)
    return found.hexdigest()


def _add_value(found: hashlib._Hash, name: str, value: Any) -> None:
    """A field of a plan: a tensor, a grid, a tuple of grids, or a plain value."""
    if isinstance(value, Tensor):
        _add(found, name, value)
    elif hasattr(value, "zero_point"):
        _add(found, f"{name} {value.spec}", torch.stack([value.scale.flatten(), value.zero_point.flatten()]))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _add_value(found, f"{name}.{index}", item)
    else:
        found.update(f"{name} {value!r}".encode())


def _add(found: hashlib._Hash, name: str, tensor: Tensor) -> None:
    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
