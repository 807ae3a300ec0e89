"""Which networks there are, by name; this module imports no torch, so that `--help` stays quick."""

import importlib.util
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from qtool.errors import ConfigError, ModelError, nearest

DEFAULT_ARCH = "digits_resnet"


@dataclass(frozen=True)
class PreprocessingHint:
    """How the images were prepared that a network was trained on.

    Args:
        resize: what the short side is resized to, pixels; None leaves images as they are.
        crop: side of the square cut from the middle, pixels; None cuts nothing.
        mean: subtracted from each channel once values are in [0, 1], one per channel.
        std: what each channel is then divided by, one per channel.
        interpolation: how pixels are resized, as torchvision's InterpolationMode spells it.
    """

    resize: int | None
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_PREPROCESSING = PreprocessingHint(None, None, IMAGENET_MEAN, IMAGENET_STD)
DISTILLER_PREPROCESSING = PreprocessingHint(None, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Mean and standard deviation of the training images of qtool/data/digits.npz, divided by 16.
DIGITS_PREPROCESSING = PreprocessingHint(None, None, (0.3055,), (0.3766,))


@dataclass(frozen=True)
class OwnArch:
    """A network that qtool defines itself.

    Args:
        factory: module and class, as `module:Class`; the class takes num_classes and settings.
        input_shape: (C, H, W) of one image.
        preprocessing: what the published weights of this network were trained on.
        settings: further keyword arguments of the class.
        packaged_weights: file beside this one that holds trained weights.
    """

    factory: str
    input_shape: tuple[int, ...]
    preprocessing: PreprocessingHint
    settings: dict[str, int] = field(default_factory=dict)
    packaged_weights: str | None = None


CIFAR = OwnArch("qtool.models.cifar:CifarResNet", (3, 32, 32), CIFAR_PREPROCESSING)
DISTILLER_CIFAR = OwnArch("qtool.models.cifar:DistillerResNet", (3, 32, 32), DISTILLER_PREPROCESSING)
CIFAR_DEPTHS = (20, 32, 44, 56)

OWN_ARCHS: dict[str, OwnArch] = {
    "digits_resnet": OwnArch(
        "qtool.models.digits:DigitsResNet",
        (1, 8, 8),
        DIGITS_PREPROCESSING,
        packaged_weights="digits_resnet.pth",
    ),
    **{f"resnet{depth}": replace(CIFAR, settings={"depth": depth}) for depth in CIFAR_DEPTHS},
    **{f"resnet{depth}_cifar": replace(DISTILLER_CIFAR, settings={"depth": depth}) for depth in CIFAR_DEPTHS},
}
ALIASES: dict[str, str] = {
    **{f"cifar_resnet{depth}": f"resnet{depth}" for depth in CIFAR_DEPTHS},
    **{f"resnet{depth}_distiller": f"resnet{depth}_cifar" for depth in CIFAR_DEPTHS},
}


def list_archs() -> list[str]:
    """The name of every network that `load_model` builds, sorted; aliases are left out.

    Example:
        >>> {"digits_resnet", "resnet18", "resnet20", "resnet20_cifar"} <= set(list_archs())
        True
    """
    return sorted(OWN_ARCHS.keys() | torchvision_archs())


@cache
def torchvision_archs() -> frozenset[str]:
    """The names of torchvision's classification models.

    They are read from torchvision's source, because asking torchvision for them imports torch.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    # Detection, segmentation and video models live in subfolders, which glob leaves out.
    files = (Path(spec.submodule_search_locations[0]) / "models").glob("*.py")
    registered = re.compile(r"^@register_model\(\)$.*?^def (\w+)\(", re.MULTILINE | re.DOTALL)
    return frozenset(name for file in files for name in registered.findall(file.read_text(encoding="utf-8")))


def canonical_arch(arch: str) -> str:
    """The one spelling of a network's name: aliases are replaced, unknown names refused.

    Raises:
        ModelError: if no network has that name; the message names those spelled most like it.

    Example:
        >>> canonical_arch("resnet20_distiller")
        'resnet20_cifar'
    """
    arch = ALIASES.get(arch, arch)
    if arch in OWN_ARCHS or arch in torchvision_archs():
        return arch
    known = [*list_archs(), *ALIASES]
    advice = nearest(arch.lower(), known) or "; give a torchvision classification model, or file.py:factory"
    raise ModelError(f"--arch: no network is called '{arch}'{advice}")


def fit_to_shape(hint: PreprocessingHint, input_shape: tuple[int, ...]) -> PreprocessingHint:
    """The same preparation for images of another size: resize and crop keep their proportion.

    Raises:
        ConfigError: if input_shape is not (C, H, W) with H equal to W, while hint crops squares.

    Example:
        >>> hint = PreprocessingHint(256, 224, IMAGENET_MEAN, IMAGENET_STD)
        >>> fit_to_shape(hint, (3, 112, 112)).resize
        128
    """
    if hint.crop is None or hint.resize is None:
        return hint
    side = input_shape[-1]
    if len(input_shape) != 3 or input_shape[1] != side:
        raise ConfigError(f"--input-shape: {input_shape} is not a square image; give C,H,W with H equal to W")
    return replace(hint, crop=side, resize=round(hint.resize * side / hint.crop))
