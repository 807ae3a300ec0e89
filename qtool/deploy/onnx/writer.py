"""An ONNX graph while it is written: nodes, constants, and names that are used once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.deploy.onnx.extra import load_extra

# Opsets that the rules are written for: the first has Split and ReduceMean in their present form, the
# last has integers of 4 and 16 bits in QuantizeLinear and DequantizeLinear.
OLDEST_OPSET, NEWEST_OPSET = 18, 21


class NotInOnnx(Exception):
    """Why a layer cannot be written, and what would work instead."""


class Writer:
    """Collects the nodes and constants of a graph.

    Args:
        opset: version of the operators, OLDEST_OPSET to NEWEST_OPSET.

    Attributes:
        nodes, initializers: onnx.NodeProto and onnx.TensorProto, in order.
        input: name of the graph's first input, whose first dimension is the batch.
    """

    def __init__(self, opset: int = NEWEST_OPSET) -> None:
        self.onnx: Any = load_extra("onnx", "--format onnx")
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.input = ""
        self._taken: set[str] = set()
        self._numbers: dict[tuple[Any, ...], str] = {}

    def free_name(self, wanted: str) -> str:
        """The name itself, or with a number behind it if it is taken; taken from now on."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node of one output; the output has the node's name."""
        return self.ops(kind, inputs, [name], **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node of several outputs; the node has the name of the first."""
        outputs = [self.free_name(name) for name in names]
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), outputs, name=outputs[0], **given))
        return outputs

    def tensor(self, value: Tensor, name: str) -> str:
        """Add a constant tensor."""
        return self.array(value.detach().cpu().contiguous().numpy(), name)

    def array(self, value: Any, name: str) -> str:
        """Add a constant array."""
        name = self.free_name(name)
        self.initializers.append(self.onnx.numpy_helper.from_array(value, name))
        return name

    def integers(self, value: Tensor, name: str, dtype: str) -> str:
        """Add a constant of an integer type, such as "int4", "uint8" or "int16"."""
        array = value.detach().cpu().to(torch.int64).contiguous().numpy()
        if dtype in ("int4", "uint4"):
            return self.array(array.astype(getattr(load_extra("ml_dtypes", "--format onnx"), dtype)), name)
        return self.array(array.astype(dtype), name)

    def number(self, value: float, dtype: str = "float32") -> str:
        """The constant of one number, made once."""
        return self._once(np.array(value, dtype=dtype))

    def numbers(self, values: Sequence[int]) -> str:
        """The constant list of integers, such as axes or a shape, made once."""
        return self._once(np.array(values, dtype=np.int64))

    def _once(self, array: Any) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._numbers:
            self._numbers[key] = self.array(array, f"constant_{len(self._numbers)}")
        return self._numbers[key]
