"""torchvision's classification networks, with its weights or with room for a checkpoint's."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from qtool.errors import ConfigError, ModelError, nearest
from qtool.models.archs import PreprocessingHint, fit_to_shape
from qtool.models.blueprint import Blueprint, one_line

# The published weights of these two expect inputs that the network itself normalizes once more, and
# their auxiliary classifiers take part in training only.
WITH_AUX = {"transform_input": True, "aux_logits": False, "init_weights": False}
SETTINGS: dict[str, dict[str, Any]] = {"googlenet": WITH_AUX, "inception_v3": WITH_AUX}
AUX_KEYS = re.compile(r"(aux1|aux2|AuxLogits)\.")
# Arch prefix -> how its published files spell keys that torchvision has since renamed.
RENAMED_KEYS = {
    "densenet": [(re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\."), r"\1\2.")],
    "vit_": [(re.compile(r"\.mlp\.linear_1\."), ".mlp.0."), (re.compile(r"\.mlp\.linear_2\."), ".mlp.3.")],
}


def choose_weights(arch: str, name: str | None = None) -> Any:
    """The entry called name of an arch's weights enum in torchvision; None stands for the first listed.

    Raises:
        ConfigError: if there is no such entry, or if it has no classifier.
    """
    entries = torchvision_models.get_model_weights(arch)
    if name is None:
        return next(iter(entries))
    if name not in entries.__members__:
        known = [entry.name for entry in entries]
        advice = nearest(name, known) or f"; choose {' or '.join(known)}"
        raise ConfigError(f"--weights: {arch} has no weights called '{name}'{advice}")
    if entries[name].meta["categories"] is None:
        raise ConfigError(f"--weights: {name} of {arch} has no classifier; choose {next(iter(entries)).name}")
    return entries[name]


def preprocessing_of(entry: Any) -> PreprocessingHint:
    """The image transforms that torchvision names beside these weights."""
    preset = entry.transforms()
    return PreprocessingHint(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _usual_shape(hint: PreprocessingHint) -> tuple[int, ...]:
    assert hint.crop is not None, "torchvision crops the images of all its classification networks"
    return (3, hint.crop, hint.crop)


def zoo_blueprint(arch: str, input_shape: tuple[int, ...] | None = None) -> Blueprint:
    """The blueprint of a torchvision network without weights, to be used as its first weights were.

    Raises:
        ConfigError: if input_shape is not square.
    """
    hint = preprocessing_of(choose_weights(arch))
    shape = input_shape or _usual_shape(hint)
    settings = dict(SETTINGS.get(arch, {}))
    if arch.startswith("vit_"):  # one position embedding per patch
        settings["image_size"] = shape[-1]

    def build(num_classes: int | None) -> nn.Module:
        classes = {} if num_classes is None else {"num_classes": num_classes}
        try:
            model: nn.Module = torchvision_models.get_model(arch, weights=None, **settings, **classes)
        except AssertionError as error:
            raise ModelError(f"{arch}: no input of shape {shape} ({error}); correct --input-shape") from error
        return model

    return Blueprint(arch, build, shape, fit_to_shape(hint, shape))


def pretrained_blueprint(
    arch: str, weights: str | None = None, input_shape: tuple[int, ...] | None = None
) -> Blueprint:
    """The blueprint of a torchvision network with torchvision's weights, and used as they were.

    They are downloaded when it is built, unless they are in torch's cache.

    Raises:
        ConfigError: if there are no weights of that name, or if input_shape is not square.
    """
    entry = choose_weights(arch, weights)
    hint = preprocessing_of(entry)
    shape = input_shape or _usual_shape(hint)
    settings = {"aux_logits": False} if arch in SETTINGS else {}

    def build(num_classes: int | None) -> nn.Module:
        _check_classes(arch, entry, num_classes)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where torch would announce the download
                model: nn.Module = torchvision_models.get_model(arch, weights=entry, **settings)
        # urllib, ssl, zipfile, pickle and torch all have errors of their own for this.
        except Exception as error:
            raise ModelError(_why_not_pretrained(arch, entry, error)) from error
        return model

    return Blueprint(arch, build, shape, fit_to_shape(hint, shape), f"torchvision {entry.name}")


def _check_classes(arch: str, entry: Any, num_classes: int | None) -> None:
    trained_classes = len(entry.meta["categories"])
    if num_classes not in (None, trained_classes):
        raise ConfigError(
            f"--num-classes: {entry.name} of {arch} has {trained_classes} classes, not {num_classes}; "
            "leave out --pretrained or --num-classes"
        )


def _why_not_pretrained(arch: str, entry: Any, error: Exception) -> str:
    file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
    if file.exists():
        return (
            f"{file}: not readable as weights of {arch} ({one_line(error)}); delete it to download it again"
        )
    return (
        f"{entry.url}: cannot be downloaded ({one_line(error)}); put that file at {file}, or use --checkpoint"
    )


def rename_keys(arch: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the keys that torchvision's networks have today, without auxiliary classifiers."""
    if arch in SETTINGS:
        state = {key: tensor for key, tensor in state.items() if not AUX_KEYS.match(key)}
    for prefix, patterns in RENAMED_KEYS.items():
        if arch.startswith(prefix):
            for pattern, replacement in patterns:
                state = {pattern.sub(replacement, key): tensor for key, tensor in state.items()}
    return state
