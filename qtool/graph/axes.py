"""Which axis of a tensor holds the images, and which the channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

# Operations whose output has its channels on the last axis, and on the second one.
CHANNELS_LAST = frozenset({"linear", "layer_norm", "softmax", "embedding", "matmul", "rms_norm"})
CHANNELS_SECOND = ("conv", "batch_norm", "pool", "placeholder", "group_norm", "interpolate", "upsample")


def batch_axis(shape: Sequence[int], images: int, other: Sequence[int], other_images: int) -> int | None:
    """The axis that holds the images of a tensor, from its shapes with two numbers of them.

    Args:
        shape: with so many images.
        other: with another number of them.

    Returns:
        the only axis whose length is proportional to the number of images; None if no axis depends on it.

    Raises:
        ValueError: if it cannot be told: several axes change, or one in another proportion.

    Example:
        >>> batch_axis((512, 49, 96), 8, (128, 49, 96), 2)    # 64 windows an image
        0
    """
    if len(shape) != len(other):
        raise ValueError(f"{len(shape)} axes with {images} images, {len(other)} with {other_images}")
    changed = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if not changed:
        return None
    (axis, *more) = changed
    if more or shape[axis] * other_images != other[axis] * images or shape[axis] % images:
        raise ValueError(f"{tuple(shape)} with {images} images, {tuple(other)} with {other_images}")
    return axis


def channel_axis(node: fx.Node) -> int:
    """The axis of a node's result that holds its channels: 0 for a tensor of one axis.

    Convolutions, batch norms and pooling have it second; linear layers, layer norms and products of
    matrices last; what works element by element has that of its input.
    """
    dims = int(node.meta["value"].dim())
    if dims < 2:
        return 0
    op = str(node.meta["op"])
    if op in CHANNELS_LAST:
        return dims - 1
    if any(word in op for word in CHANNELS_SECOND):
        return 1
    for source in node.all_input_nodes:
        value = source.meta.get("value")
        if "layer" in node.meta and getattr(value, "shape", None) == node.meta["value"].shape:
            return channel_axis(source)
    return 1 if dims == 4 else dims - 1
