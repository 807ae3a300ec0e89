"""What a rule is to know of the operation that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qtool.deploy.onnx.shapes import Shapes, Size
from qtool.deploy.onnx.writer import NotInOnnx, Writer


@dataclass(frozen=True)
class Site:
    """An operation in its graph.

    Args:
        w: the graph that is written.
        shapes: of the network.
        node: the operation.
        module: that computes it, with its settings; what is a function has them in the node's arguments.
        name: for the result.
        name_of: the tensor that has a node's value.
    """

    w: Writer
    shapes: Shapes
    node: fx.Node
    module: nn.Module | None
    name: str
    name_of: Callable[[fx.Node], str]

    def tensor(self, position: int = 0, key: str = "input") -> str:
        """The name of an argument's tensor; a number is made a constant.

        Raises:
            NotInOnnx: if the argument is missing, or is neither.
        """
        value = self._argument(key, position, None)
        if isinstance(value, fx.Node) and self.is_tensor(value):
            return self.name_of(value)
        number = self.shapes.fixed(value)
        if not isinstance(number, (int, float)):
            raise NotInOnnx(f"its argument {position} is no tensor, but {number!r}")
        return self.w.number(number)

    def tensors(self) -> list[str]:
        """The names of the tensors among its arguments, in order."""
        arguments = [argument for argument in self.node.args if isinstance(argument, fx.Node)]
        return [self.name_of(node) for node in arguments if self.is_tensor(node)]

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor."""
        return hasattr(self.shapes.value(node), "shape") and not isinstance(self.shapes.value(node), tuple)

    def setting(self, key: str, position: int, default: Any = None) -> Any:
        """A setting: the module's attribute, or the function's argument.

        Raises:
            NotInOnnx: if it depends on the image.
        """
        if hasattr(self.module, key):
            return getattr(self.module, key)
        return self.shapes.fixed(self._argument(key, position, default))

    def _argument(self, key: str, position: int, default: Any) -> Any:
        if key in self.node.kwargs:
            return self.node.kwargs[key]
        return self.node.args[position] if position < len(self.node.args) else default

    @property
    def source(self) -> fx.Node:
        """The node of the first argument."""
        node = self._argument("input", 0, None)
        if isinstance(node, (tuple, list)):
            node = node[0]
        if not isinstance(node, fx.Node):
            raise NotInOnnx("its first argument is not computed by the network")
        return node

    def sizes_read(self) -> list[Size]:
        """The dimensions of the first argument."""
        return self.shapes.sizes(self.source)

    def sizes(self) -> list[Size]:
        """The dimensions of the result."""
        return self.shapes.sizes(self.node)

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node of one output; without a name it is that of the result."""
        return self.w.op(kind, inputs, name or self.name, **attributes)


Rule = Callable[[Site], str]
