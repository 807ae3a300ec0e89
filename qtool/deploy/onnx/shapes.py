"""Which dimensions of a network's tensors are the number of images, and which are fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtool.deploy.onnx.writer import NotInOnnx, Writer
from qtool.graph import ops

# Numbers of images for which a network is run to find out.
FEWER, MORE = 2, 3


@dataclass(frozen=True)
class Size:
    """A dimension: so many times the number of images, or a fixed number.

    Args:
        images: how many times the number of images, 0 if fixed.
        fixed: the number if it is.
    """

    images: int
    fixed: int

    @classmethod
    def of(cls, fewer: int, more: int) -> Size:
        """From its value with FEWER and with MORE images.

        Raises:
            NotInOnnx: if it is no multiple of the number of images.

        Example:
            >>> Size.of(24, 36), Size.of(7, 7)
            (Size(images=12, fixed=0), Size(images=0, fixed=7))
        """
        each = (more - fewer) // (MORE - FEWER)
        if fewer == more:
            return cls(0, fewer)
        if each < 1 or fewer != FEWER * each:
            raise NotInOnnx(f"the size {fewer} is no multiple of the {FEWER} images in a batch")
        return cls(each, 0)


class Shapes:
    """What every node of a network gives for two sizes of a batch.

    Args:
        network: a traced network.
        shape: (C, H, W) of an image.
    """

    def __init__(self, network: fx.GraphModule, shape: tuple[int, ...]) -> None:
        self._fewer = _values(network, shape, FEWER)
        self._more = _values(network, shape, MORE)
        self.constants = _constant_nodes(network.graph)

    def value(self, node: fx.Node) -> Any:
        """What a node gives for FEWER images, tensors included."""
        return self._fewer[node]

    def sizes(self, node: fx.Node, index: int | None = None) -> list[Size]:
        """The dimensions of the tensor that a node gives, or of one of several."""
        fewer, more = self._fewer[node], self._more[node]
        if index is not None:
            fewer, more = fewer[index], more[index]
        return [Size.of(a, b) for a, b in zip(fewer.shape, more.shape, strict=True)]

    def fixed(self, value: Any) -> Any:
        """An argument with the nodes in it replaced by the numbers that they give.

        Raises:
            NotInOnnx: if one of them depends on the number of images, or is a tensor.
        """

        def number(node: fx.Node) -> Any:
            fewer, more = self._fewer[node], self._more[node]
            if isinstance(fewer, Tensor) or fewer != more:
                raise NotInOnnx("reads a number that depends on its input, or on the number of images")
            return fewer

        return fx.node.map_arg(value, number)

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor that a node gives for every input, if it is one."""
        fewer, more = self._fewer[node], self._more[node]
        if node in self.constants and isinstance(fewer, Tensor) and torch.equal(fewer, more):
            return fewer
        return None


def reshape(w: Writer, source: str, sizes: list[Size], name: str) -> str:
    """The values of a tensor in another shape."""
    if sum(size.images > 0 for size in sizes) <= 1:
        return w.op("Reshape", [source, w.numbers([-1 if s.images else s.fixed for s in sizes])], name)
    return w.op("Reshape", [source, shape_tensor(w, sizes, f"{name}_shape")], name)


def shape_tensor(w: Writer, sizes: list[Size], name: str) -> str:
    """A list of integers that is found at run time."""
    if not any(size.images for size in sizes):
        return w.numbers([size.fixed for size in sizes])
    images = w.op("Shape", [w.input], f"{name}_images", start=0, end=1)
    parts = []
    for size in sizes:
        if size.images == 0:
            parts.append(w.numbers([size.fixed]))
        elif size.images == 1:
            parts.append(images)
        else:
            parts.append(w.op("Mul", [images, w.numbers([size.images])], f"{name}_part"))
    return w.op("Concat", parts, name, axis=0)


def _values(network: fx.GraphModule, shape: tuple[int, ...], images: int) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}
    kept = _constant_nodes(network.graph)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            # Only shapes of what depends on the image matter; a large network's values need not be kept.
            found[n] = result if n in kept else fx.node.map_aggregate(result, _without_values)
            return result

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        Recorder(network).run(torch.randn(images, *shape, generator=generator))
    return found


def _without_values(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are no layers, and whose values do not depend on those of the image."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads_shape = node.meta.get("op") in ops.READS_SHAPE and node.op != "get_attr"
        computes = "layer" in node.meta or node.meta.get("op") in ("quantize", "dequantize")
        if node.op in ("placeholder", "output") or computes:
            continue
        if reads_shape or all(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
