"""How an image becomes the tensor that a model expects."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from qtool.errors import ConfigError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PreprocessingLike(Protocol):
    """Anything with the fields of a Preprocessing, such as the wishes of a model."""

    @property
    def resize(self) -> int | None: ...
    @property
    def crop(self) -> int | None: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def interpolation(self) -> str: ...


@dataclass(frozen=True)
class Preprocessing:
    """The steps from an image to a tensor, as in torchvision's ImageClassification preset.

    Attributes:
        resize: what the short side is scaled to, in pixels, or None.
        crop: the side of the centre crop, in pixels, or None; a smaller image is padded with black.
        mean: subtracted from each channel, units of [0, 1]; one value, or one per channel.
        std: what each channel is then divided by, greater than 0; as many as mean, or one.
        interpolation: how to resize: "bilinear", "bicubic", "nearest", "box", "hamming" or "lanczos".

    Raises:
        ConfigError: if any of them is out of its range.
    """

    resize: int | None
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise ConfigError(f"{name}: {size} is not a number of pixels greater than 0")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not values or not all(math.isfinite(value) for value in values):
                raise ConfigError(f"{name}: {_listed(values)} is not one finite number per channel")
        if min(self.std) <= 0:
            raise ConfigError(f"std: {_listed(self.std)} is not greater than 0")
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ConfigError(f"std: {len(self.std)} values, but mean has {len(self.mean)}")
        names = [mode.value for mode in InterpolationMode]
        if self.interpolation not in names:
            raise ConfigError(
                f"interpolation: {self.interpolation!r} is unknown{nearest(self.interpolation, names)}"
            )

    def for_channels(self, channels: int) -> "Preprocessing":
        """The same steps with one mean and std per channel, for a model that takes so many channels.

        Raises:
            ConfigError: if mean or std has neither one value nor one per channel.

        Example:
            >>> Preprocessing(None, None, (0.5,), (0.25,)).for_channels(3).mean
            (0.5, 0.5, 0.5)
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ConfigError(
                    f"{name}: {len(values)} values, but the model takes {channels} "
                    f"channel{'s' if channels > 1 else ''}; give --{name} one value, or one per channel"
                )
        mean, std = (v if len(v) == channels else v * channels for v in (self.mean, self.std))
        return replace(self, mean=mean, std=std)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The function from an image to a float32 tensor of shape (C, H, W), C being the values of mean.

        A grey image becomes C equal channels. An RGB image needs C = 3.
        """
        channels = max(len(self.mean), len(self.std))
        whole = self.for_channels(channels)
        steps: list[Callable[..., object]] = []
        if self.resize is not None:
            steps.append(transforms.Resize(self.resize, InterpolationMode(self.interpolation)))
        if self.crop is not None:
            steps.append(transforms.CenterCrop(self.crop))
        steps += [transforms.ToTensor(), _Expand(channels), transforms.Normalize(whole.mean, whole.std)]
        composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
        return composed


@dataclass(frozen=True)
class _Expand:
    """Repeats a single channel; a class, as worker processes may receive it pickled."""

    channels: int

    def __call__(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == self.channels else x.expand(self.channels, -1, -1)


DEFAULTS = {
    "folder": Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": Preprocessing(None, None, (0.5,), (0.5,)),
    "cifar100": Preprocessing(None, None, (0.5,), (0.5,)),
    "mnist": Preprocessing(None, None, (0.1307,), (0.3081,)),
    "fashion-mnist": Preprocessing(None, None, (0.1307,), (0.3081,)),
    "npz": Preprocessing(None, None, (0.5,), (0.5,)),
    # Measured on the training part of the digits, whose pixels are scaled to [0, 1].
    "digits": Preprocessing(None, None, (0.3055,), (0.3766,)),
}


def default_preprocessing(dataset_kind: str, arch: str | None) -> Preprocessing:
    """What models trained on such a dataset usually expect.

    Args:
        dataset_kind: one of kinds.KINDS.
        arch: the name of the network, or None; Inception takes larger images than the others.
    """
    usual = DEFAULTS[dataset_kind]
    if dataset_kind == "folder" and arch is not None and arch.lower().startswith("inception"):
        return replace(usual, resize=336, crop=299)
    return usual


def choose_preprocessing(
    kind: str,
    hint: PreprocessingLike | None,
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    arch: str | None = None,
) -> Preprocessing:
    """What the user asked for, over what the model wants, over what is usual for the dataset.

    Args:
        kind: one of kinds.KINDS.
        hint: what the model wants, or None if it is not known.
        resize, crop: in pixels; 0 leaves the step out, None asks for nothing.
        mean, std: per channel, or None.
        arch: the name of the network, for the default, or None.

    Raises:
        ConfigError: if a value is out of its range.

    Example:
        >>> choose_preprocessing("folder", None, resize=0, mean=[0.5], std=[0.5])
        Preprocessing(resize=None, crop=224, mean=(0.5,), std=(0.5,), interpolation='bilinear')
    """
    chosen = default_preprocessing(kind, arch)
    if hint is not None:
        chosen = Preprocessing(hint.resize, hint.crop, tuple(hint.mean), tuple(hint.std), hint.interpolation)
    return replace(
        chosen,
        resize=chosen.resize if resize is None else resize or None,
        crop=chosen.crop if crop is None else crop or None,
        mean=chosen.mean if mean is None else tuple(mean),
        std=chosen.std if std is None else tuple(std),
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "no value"
