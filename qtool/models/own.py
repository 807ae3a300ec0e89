"""The networks that qtool defines itself, the entries of OWN_ARCHS."""

import importlib
from pathlib import Path

from torch import nn

from qtool.errors import ConfigError
from qtool.models.archs import OWN_ARCHS
from qtool.models.blueprint import Blueprint
from qtool.models.checkpoint import classes_of, compare_keys, load_state, read_checkpoint, state_dict_of


def own_blueprint(arch: str, input_shape: tuple[int, ...] | None = None, packaged: bool = True) -> Blueprint:
    """The blueprint of one of qtool's own networks.

    Args:
        arch: a key of OWN_ARCHS.
        input_shape: (C, H, W) of one image, if not the usual one.
        packaged: whether to take the weights that come with qtool, if there are any.
    """
    own = OWN_ARCHS[arch]
    weights_file = own.packaged_weights if packaged else None

    def build(num_classes: int | None) -> nn.Module:
        module, _, class_name = own.factory.partition(":")
        network_class = getattr(importlib.import_module(module), class_name)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        model: nn.Module = network_class(**own.settings, **classes)
        if weights_file:
            _load_packaged(model, arch, Path(__file__).with_name(weights_file))
        return model

    weights = f"qtool's own {arch} weights" if weights_file else None
    return Blueprint(arch, build, input_shape or own.input_shape, own.preprocessing, weights)


def _load_packaged(model: nn.Module, arch: str, path: Path) -> None:
    state = state_dict_of(read_checkpoint(path), path)
    trained_classes = classes_of(compare_keys(model, state), model)
    if trained_classes is not None:
        raise ConfigError(
            f"--num-classes: the packaged weights of {arch} have {trained_classes} classes; "
            "leave it out, or give a --checkpoint"
        )
    load_state(model, state)
