"""A network by name, path or import, with its weights: `load_model(arch)`.

What needs torch is imported when it is first asked for, so that names of networks come quickly.
"""

from typing import TYPE_CHECKING, Any

from qtool.models.archs import DEFAULT_ARCH, OWN_ARCHS, PreprocessingHint, list_archs

if TYPE_CHECKING:
    from qtool.models.checkpoint import checkpoint_sha256, read_checkpoint
    from qtool.models.load import LoadedModel, load_model

__all__ = [
    "DEFAULT_ARCH",
    "OWN_ARCHS",
    "LoadedModel",
    "PreprocessingHint",
    "checkpoint_sha256",
    "list_archs",
    "load_model",
    "read_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in ("LoadedModel", "load_model"):
        from qtool.models import load

        return getattr(load, name)
    if name in ("checkpoint_sha256", "read_checkpoint"):
        from qtool.models import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
