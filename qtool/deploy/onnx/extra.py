"""onnx and onnxruntime, which come with an extra of qtool."""

from __future__ import annotations

import importlib
from typing import Any

from qtool.errors import ConfigError

PIP = "pip install 'qtool[onnx]'"


def load_extra(module: str, needed_by: str) -> Any:
    """A module of the extra, by name.

    Args:
        module: such as "onnx" or "onnxruntime".
        needed_by: the flag or file that needs it, for the message.

    Raises:
        ConfigError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{needed_by}: needs {package}, which is not installed; {PIP}") from error


def has_extra(module: str) -> bool:
    """Whether a module of the extra can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
