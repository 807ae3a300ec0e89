"""A network by name or from a file, with its weights, ready to be evaluated."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import ConfigError, ModelError
from qtool.models import zoo
from qtool.models.archs import (
    DEFAULT_ARCH,
    OWN_ARCHS,
    PreprocessingHint,
    canonical_arch,
    torchvision_archs,
)
from qtool.models.blueprint import Blueprint, build_seeded, check_runs
from qtool.models.checkpoint import (
    checkpoint_sha256,
    classes_of,
    compare_keys,
    load_state,
    read_checkpoint,
    state_dict_of,
)
from qtool.models.own import own_blueprint
from qtool.models.user_file import split_user_file, user_blueprint

# How many torchvision networks are tried when looking for one that a checkpoint fits.
ARCHS_TRIED = 6


@dataclass(frozen=True)
class LoadedModel:
    """A network, and what is known about it.

    Args:
        model: in eval mode, on the CPU, float32, its parameters without gradients.
        arch: its name, in its canonical spelling.
        input_shape: (C, H, W) of one image.
        preprocessing: what its images go through; None for the user's own network.
        weights: where its weights come from, a few words for the log and the results.
        checkpoint_sha256: of the checkpoint file, 64 hexadecimal digits; None without one.
    """

    model: nn.Module
    arch: str
    input_shape: tuple[int, ...]
    preprocessing: PreprocessingHint | None
    weights: str
    checkpoint_sha256: str | None


def load_model(
    arch: str | None = None,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    check: bool = True,
) -> LoadedModel:
    """Build a network and give it its weights.

    Args:
        arch: a torchvision classification model, one of qtool's own, or `file.py:factory`; None is
            DEFAULT_ARCH, which has packaged weights.
        pretrained: take torchvision's weights, downloaded unless they are in its cache.
        weights: which of them, as "IMAGENET1K_V2"; None is the first that torchvision lists.
        checkpoint: a file with the weights.
        num_classes: rows of the classifier, at least 1; None takes the usual number, or the
            checkpoint's where nothing else differs.
        input_shape: (C, H, W) of one image; None takes the usual one.
        seed: for the weights of a network that is given none.
        check: whether to run a network that nobody has tried before; weights that mean nothing may send
            one with loops on values anywhere.

    Raises:
        ConfigError: if the arguments contradict each other.
        ModelError: if there is no such network, or if its weights cannot be read or do not fit.
    """
    _check_arguments(pretrained, weights, checkpoint, num_classes, input_shape)
    blueprint = _find_blueprint(arch, pretrained, weights, input_shape, packaged=checkpoint is None)
    if checkpoint is None:
        model = build_seeded(blueprint, num_classes, seed)
        origin, sha256 = blueprint.weights or f"random weights (seed {seed})", None
    else:
        model = _build_from_checkpoint(blueprint, checkpoint, num_classes)
        sha256 = checkpoint_sha256(checkpoint)
        origin = f"checkpoint {checkpoint.name} (sha256 {sha256[:12]})"
    model = model.cpu().float().eval().requires_grad_(False)
    shape = _input_shape(blueprint, model)
    if check and (input_shape or not blueprint.resizable):
        check_runs(model, blueprint.arch, shape)
    return LoadedModel(model, blueprint.arch, shape, blueprint.preprocessing, origin, sha256)


def _check_arguments(
    pretrained: bool,
    weights: str | None,
    checkpoint: Path | None,
    num_classes: int | None,
    input_shape: tuple[int, ...] | None,
) -> None:
    if weights is not None and not pretrained:
        raise ConfigError(f"--weights: {weights} is a choice among pretrained weights; add --pretrained")
    if pretrained and checkpoint is not None:
        raise ConfigError(f"--pretrained: {checkpoint} holds weights already; leave out one of the two")
    if num_classes is not None and num_classes < 1:
        raise ConfigError(f"--num-classes: found {num_classes}; give at least 1")
    if input_shape is not None and not _is_shape(input_shape):
        raise ConfigError(
            f"--input-shape: found {input_shape}; give positive numbers C,H,W, such as 3,224,224"
        )


def _find_blueprint(
    arch: str | None,
    pretrained: bool,
    weights: str | None,
    input_shape: tuple[int, ...] | None,
    packaged: bool,
) -> Blueprint:
    arch = arch or DEFAULT_ARCH
    user_file = split_user_file(arch)
    name = arch if user_file else canonical_arch(arch)
    if pretrained and name not in torchvision_archs():
        raise ConfigError(f"--pretrained: {name} is not torchvision's; leave it out, or name such a network")
    if user_file:
        return user_blueprint(*user_file, input_shape)
    if name in OWN_ARCHS:
        return own_blueprint(name, input_shape, packaged)
    if pretrained:
        return zoo.pretrained_blueprint(name, weights, input_shape)
    return zoo.zoo_blueprint(name, input_shape)


def _input_shape(blueprint: Blueprint, model: nn.Module) -> tuple[int, ...]:
    shape = blueprint.input_shape or getattr(model, "input_shape", None)
    if shape is None:
        raise ModelError(
            f"{blueprint.arch}: the shape of its input is not known; give --input-shape, such as 3,224,224"
        )
    if not _is_shape(shape):
        raise ModelError(
            f"{blueprint.arch}: input_shape is {shape!r}; it should be (C, H, W), such as (3, 32, 32)"
        )
    return tuple(shape)


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, tuple | list)
        and len(shape) > 0
        and all(isinstance(size, int) and size > 0 for size in shape)
    )


def _build_from_checkpoint(blueprint: Blueprint, path: Path, num_classes: int | None) -> nn.Module:
    saved = state_dict_of(read_checkpoint(path), path)
    state = zoo.rename_keys(blueprint.arch, saved)
    model = build_seeded(blueprint, num_classes, seed=0)
    mismatch = compare_keys(model, state)
    checkpoint_classes = classes_of(mismatch, model)
    if checkpoint_classes is not None and num_classes is None and blueprint.resizable:
        model = build_seeded(blueprint, checkpoint_classes, seed=0)
        mismatch = compare_keys(model, state)
    if mismatch:
        fitting = _find_fitting_arch(saved, blueprint.arch, path)
        advice = f"use -a {fitting}, which it fits" if fitting else "name the network that it was saved from"
        raise ModelError(f"{path}: does not fit {blueprint.arch}: {mismatch}; {advice}")
    load_state(model, state)
    return model


def _find_fitting_arch(saved: dict[str, Tensor], asked: str, path: Path) -> str | None:
    """A network other than the one asked for that a checkpoint fits, up to the number of classes.

    Building all of torchvision's takes seconds, so only those are tried whose name is close to what
    was asked for, or to the name of the file.
    """
    # RegNets compute their widths with tensors, which cannot be done without allocating the network.
    others = [name for name in torchvision_archs() if not name.startswith("regnet")]
    close = [
        name
        for word in (path.name.partition(".")[0], asked)
        for name in difflib.get_close_matches(word, sorted(others), n=ARCHS_TRIED, cutoff=0.4)
    ]
    for arch in dict.fromkeys([*OWN_ARCHS, *close]):
        with torch.device("meta"):  # shapes without values
            model = build_seeded(_find_blueprint(arch, False, None, None, packaged=False), None, seed=0)
        mismatch = compare_keys(model, zoo.rename_keys(arch, saved))
        if arch != asked and (not mismatch or classes_of(mismatch, model) is not None):
            return arch
    return None
