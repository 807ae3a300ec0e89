"""How pooling, padding and resizing are written."""

from __future__ import annotations

from typing import Any

import numpy as np

from qtool.deploy.onnx.site import Rule, Site
from qtool.deploy.onnx.writer import NotInOnnx


def _spread(value: Any, count: int) -> list[int]:
    """One number for every spatial dimension."""
    return [int(value)] * count if isinstance(value, (int, float)) else [int(v) for v in value]


def _geometry(site: Site) -> dict[str, Any]:
    """What max and average pooling have in common."""
    count = len(site.sizes_read()) - 2
    kernel = _spread(site.setting("kernel_size", 1), count)
    stride = site.setting("stride", 2)
    return {
        "kernel_shape": kernel,
        "strides": kernel if stride in (None, []) else _spread(stride, count),
        "pads": 2 * _spread(site.setting("padding", 3, 0), count),
    }


def _max_pool(site: Site) -> str:
    geometry = _geometry(site)
    dilation = _spread(site.setting("dilation", 4, 1), len(geometry["kernel_shape"]))
    ceil = int(bool(site.setting("ceil_mode", 5, False)))
    return site.op("MaxPool", site.tensor(), dilations=dilation, ceil_mode=ceil, **geometry)


def _avg_pool(site: Site) -> str:
    if site.setting("divisor_override", 6) is not None:
        raise NotInOnnx("an average with a divisor of its own")
    ceil = int(bool(site.setting("ceil_mode", 4, False)))
    pads = int(bool(site.setting("count_include_pad", 5, True)))
    return site.op("AveragePool", site.tensor(), ceil_mode=ceil, count_include_pad=pads, **_geometry(site))


def _adaptive(pool: str) -> Rule:
    """Pooling to a size: over everything, or in windows that do not overlap."""

    def rule(site: Site) -> str:
        sizes, found = site.sizes_read()[2:], site.sizes()[2:]
        if any(size.images for size in sizes):
            raise NotInOnnx("the size of its image depends on the number of images")
        if all(size.fixed == 1 for size in found):
            return site.op(f"Global{pool}", site.tensor())
        if any(a.fixed % b.fixed for a, b in zip(sizes, found, strict=True)):
            given, wanted = [s.fixed for s in sizes], [s.fixed for s in found]
            raise NotInOnnx(
                f"pools {given} to {wanted}, in windows of different sizes; a multiple is written"
            )
        kernel = [a.fixed // b.fixed for a, b in zip(sizes, found, strict=True)]
        return site.op(pool, site.tensor(), kernel_shape=kernel, strides=kernel)

    return rule


# torch's names of ways to fill, and ONNX's.
PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(site: Site) -> str:
    given = list(site.setting("pad", 1))
    mode = site.setting("mode", 2, "constant")
    count = len(site.sizes_read())
    begins, ends = [0] * count, [0] * count
    for index in range(len(given) // 2):  # torch begins with the last dimension
        begins[-1 - index], ends[-1 - index] = given[2 * index], given[2 * index + 1]
    value = site.w.number(float(site.setting("value", 3) or 0.0))
    return site.op("Pad", site.tensor(), site.w.numbers(begins + ends), value, mode=PAD_MODES[mode])


RESIZING = {"nearest": "nearest", "bilinear": "linear", "linear": "linear"}


def _interpolate(site: Site) -> str:
    mode = site.setting("mode", 3, "nearest")
    if mode not in RESIZING or site.setting("antialias", 6, False):
        raise NotInOnnx(f"resizing by {mode!r}; nearest and bilinear are written")
    corners = site.setting("align_corners", 4)
    how = "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"
    scales = [b.fixed / a.fixed for a, b in zip(site.sizes_read()[2:], site.sizes()[2:], strict=True)]
    factors = site.w.array(np.array([1.0, 1.0, *scales], dtype=np.float32), f"{site.name}_scales")
    rounding = "floor" if mode == "nearest" else None
    return site.op(
        "Resize", site.tensor(), "", factors,
        mode=RESIZING[mode], coordinate_transformation_mode=how, nearest_mode=rounding,
    )  # fmt: skip


POOLING: dict[str, Rule] = {
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **dict.fromkeys((f"adaptive_avg_pool{n}d" for n in (1, 2, 3)), _adaptive("AveragePool")),
    **dict.fromkeys((f"adaptive_max_pool{n}d" for n in (1, 2, 3)), _adaptive("MaxPool")),
    "pad": _pad,
    "interpolate": _interpolate,
    "upsample": _interpolate,
}
