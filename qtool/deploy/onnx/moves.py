"""How operations that move values without computing are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.deploy.onnx.shapes import reshape, shape_tensor
from qtool.deploy.onnx.site import Rule, Site
from qtool.deploy.onnx.writer import NotInOnnx
from qtool.graph.ops import as_function


def _reshape(site: Site) -> str:
    return reshape(site.w, site.tensor(), site.sizes(), site.name)


def _permute(site: Site) -> str:
    """Any exchange of dimensions, found out by moving those of a tensor whose sizes all differ."""
    count = len(site.sizes_read())
    sizes = torch.empty([2 + n for n in range(count)], device="meta")
    arguments = site.shapes.fixed(site.node.args[1:])
    if site.module is not None and site.node.op == "call_module":
        moved: Tensor = site.module(sizes)
    else:
        moved = as_function(site.node)(sizes, *arguments, **site.shapes.fixed(dict(site.node.kwargs)))
    return site.op("Transpose", site.tensor(), perm=[size - 2 for size in moved.shape])


def _expand(site: Site) -> str:
    return site.op("Expand", site.tensor(), shape_tensor(site.w, site.sizes(), f"{site.name}_shape"))


def _slice(site: Site, source: str, dim: int, start: int, end: int, step: int, name: str) -> str:
    ends = [site.w.numbers([value]) for value in (start, end, dim, step)]
    return site.op("Slice", source, *ends, name=name)


def _getitem(site: Site) -> str:
    """x[index], of integers, slices, None and Ellipsis."""
    index = site.shapes.fixed(site.node.args[1])
    index = index if isinstance(index, tuple) else (index,)
    sizes = site.sizes_read()
    taken = sum(item is not None and item is not Ellipsis for item in index)
    rest = [slice(None)] * (len(sizes) - taken)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *rest, *index[at + 1 :])
    x, dim = site.tensor(), 0
    for item in index:
        if item is None:
            continue
        if not isinstance(item, (int, slice)):
            raise NotInOnnx(f"an index such as {item!r}")
        if item != slice(None):
            start, end, step = _bounds(item)
            x = _slice(site, x, dim, start, end, step, f"{site.name}_part")
        dim += 1
    return reshape(site.w, x, site.sizes(), site.name)


LAST = 2**31 - 1


def _bounds(item: int | slice) -> tuple[int, int, int]:
    if isinstance(item, int):
        return item, LAST if item == -1 else item + 1, 1
    return item.start or 0, LAST if item.stop is None else item.stop, item.step or 1


def _select(site: Site) -> str:
    dim, index = site.setting("dim", 1), site.setting("index", 2)
    part = _slice(site, site.tensor(), dim, *_bounds(index), f"{site.name}_part")
    return reshape(site.w, part, site.sizes(), site.name)


def _narrow(site: Site) -> str:
    dim, start, length = (site.setting(k, n) for k, n in (("dim", 1), ("start", 2), ("length", 3)))
    return _slice(site, site.tensor(), dim, start, start + length, 1, site.name)


def _roll(site: Site) -> str:
    shifts, dims = (site.setting(*where) for where in (("shifts", 1), ("dims", 2)))
    shifts, dims = ([v] if isinstance(v, int) else list(v) for v in (shifts, dims))
    x = site.tensor()
    for shift, dim in zip(shifts, dims, strict=True):
        tail = _slice(site, x, dim, -shift, LAST, 1, f"{site.name}_tail")
        head = _slice(site, x, dim, 0, -shift, 1, f"{site.name}_head")
        x = site.op("Concat", tail, head, axis=dim)
    return x


def _flip(site: Site) -> str:
    dims = site.setting("dims", 1)
    x = site.tensor()
    for dim in [dims] if isinstance(dims, int) else dims:
        x = _slice(site, x, dim, -1, -LAST, -1, site.name)
    return x


def _repeat(site: Site) -> str:
    given: Any = site.shapes.fixed(site.node.args[1:])
    times = list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else list(given)
    if len(times) != len(site.sizes_read()):
        raise NotInOnnx("a repetition that adds dimensions")
    return site.op("Tile", site.tensor(), site.w.numbers(times))


def _pixel_shuffle(site: Site) -> str:
    factor = site.setting("upscale_factor", 1)
    return site.op("DepthToSpace", site.tensor(), blocksize=factor, mode="CRD")


def _channel_shuffle(site: Site) -> str:
    groups = site.setting("groups", 1)
    sizes = site.sizes_read()
    if any(size.images for size in sizes[1:]):
        raise NotInOnnx("the size of its channels depends on the number of images")
    spatial = [size.fixed for size in sizes[2:]]
    parts = site.w.numbers([-1, groups, sizes[1].fixed // groups, *spatial])
    apart = site.op("Reshape", site.tensor(), parts, name=f"{site.name}_groups")
    perm = [0, 2, 1, *range(3, 3 + len(spatial))]
    swapped = site.op("Transpose", apart, name=f"{site.name}_swapped", perm=perm)
    return reshape(site.w, swapped, sizes, site.name)


def split(site: Site) -> list[str]:
    """chunk, split and unbind: the names of the parts."""
    op = site.node.meta["op"]
    count = len(site.shapes.value(site.node))
    parts = [site.shapes.sizes(site.node, index) for index in range(count)]
    dim = site.setting("dim", 1 if op == "unbind" else 2, 0)
    names = [f"{site.name}_{index}" for index in range(count)]
    dim = dim % len(site.sizes_read())
    lengths = [1] * count if op == "unbind" else [part[dim].fixed for part in parts]
    if op != "unbind" and any(part[dim].images for part in parts):
        raise NotInOnnx("splits the batch")
    raw = [f"{name}_part" for name in names] if op == "unbind" else names
    pieces = site.w.ops("Split", [site.tensor(), site.w.numbers(lengths)], raw, axis=dim)
    if op != "unbind":
        return pieces
    return [reshape(site.w, x, sizes, n) for x, sizes, n in zip(pieces, parts, names, strict=True)]


def _float(site: Site) -> str:
    """A change of type or place that leaves floats as they are."""
    value, given = site.shapes.value(site.node), site.shapes.value(site.source)
    if value.dtype != given.dtype:
        raise NotInOnnx(f"changes the type to {value.dtype}")
    return site.tensor()


MOVES: dict[str, Rule] = {
    **dict.fromkeys(
        ("flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze"), _reshape
    ),
    **dict.fromkeys(("permute", "transpose", "t", "movedim", "moveaxis"), _permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("to", "float", "type", "type_as", "cpu", "alias", "to_copy"), _float),
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "roll": _roll,
    "flip": _flip,
    "pixel_shuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
}
