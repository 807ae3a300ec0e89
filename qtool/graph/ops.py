"""What an operation of the graph is, whatever form it is written in.

`x + y`, `x += y`, `torch.add(x, y)` and `x.add_(y)` are all "add"; nn.ReLU, F.relu and
x.relu_() are all "relu". Everything after tracing asks here and nowhere else.
"""

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

CONV: dict[type, str] = {nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv"}
CONV_TRANSPOSE: dict[type, str] = {
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
}
BATCH_NORM: dict[type, str] = {
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    FrozenBatchNorm2d: "batch_norm",
}
MODULE_OPS: dict[type, str] = {
    **CONV,
    **CONV_TRANSPOSE,
    **BATCH_NORM,
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.Identity: "identity",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Dropout3d: "dropout",
    nn.AlphaDropout: "dropout",
    nn.FeatureAlphaDropout: "dropout",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle",
    StochasticDepth: "stochastic_depth",
}

# Other spellings of a function's or method's name.
SPELLINGS = {
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "dropout1d": "dropout",
    "dropout2d": "dropout",
    "dropout3d": "dropout",
    "alpha_dropout": "dropout",
    "feature_dropout": "dropout",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "clip": "clamp",
    "mm": "matmul",
    "bmm": "matmul",
    "masked_softmax": "softmax",
    "new_zeros": "zeros_like",
}

# In evaluation these give back their input: the grid of a quantized value survives them.
KEEPS_GRID = frozenset(
    {"identity", "dropout", "stochastic_depth", "contiguous", "clone", "detach", "requires_grad"}
)
# These move values without computing. They are not layers: nothing is observed or quantized at
# them. As in Distiller the grid does not survive them: what reads their result quantizes it by its
# own input statistics.
MOVES = frozenset(
    {
        *("flatten", "unflatten", "view", "view_as", "reshape", "reshape_as", "squeeze", "unsqueeze"),
        *("permute", "transpose", "t", "movedim", "moveaxis", "roll", "flip", "narrow", "select"),
        *("expand", "expand_as", "broadcast_to", "repeat", "tile", "getitem", "index_select", "unfold"),
        *("chunk", "split", "unbind", "tensor_split", "split_with_sizes"),
        *("to", "float", "double", "half", "type", "type_as", "cpu", "cuda", "getattr"),
        *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("slice", "alias", "to_copy", "zeros_like"),
        *("pick", "begin_steps", "carry", "keep", "end_steps", "last_kept", "as_batch", "as_given"),
    }
)
# What these give are values of one input.
MAX_POOLS = frozenset(f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))
# What these give does not depend on the values of a tensor.
READS_SHAPE = frozenset(
    {
        *("getattr", "size", "dim", "ndimension", "numel", "nelement", "stride", "len", "isinstance"),
        *("is_floating_point", "is_complex", "is_contiguous", "get_device", "element_size"),
    }
)
SPLITS = frozenset({"chunk", "split", "unbind", "tensor_split", "split_with_sizes"})

_OPERATORS_IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.imatmul: operator.matmul,
    operator.ipow: operator.pow,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
}


class Op(nn.Module):
    """A function or tensor method as a module, so that it has a name and can be replaced."""

    def __init__(self, function: Callable[..., Any], op_name: str) -> None:
        super().__init__()
        self.function = function
        self.qtool_op = op_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return self.qtool_op


def function_name(target: Callable[..., Any] | str) -> str:
    """The plain name of what a call_function or call_method node calls: add, relu, flatten."""
    if not isinstance(target, str):
        target = getattr(_OPERATORS_IN_PLACE.get(target, target), "__name__", type(target).__name__)
    name = target.split(".")[0].strip("_")  # operators of torch.export are called relu_.default
    return SPELLINGS.get(name, name)


def module_op(module: nn.Module) -> str:
    """What a leaf module computes.

    A module may say it itself with an attribute `qtool_op`. A subclass counts as its base when it
    inherits forward; one that computes something else goes by its own class name, as does a
    class that is not in the table.
    """
    own = getattr(module, "qtool_op", None)
    if isinstance(own, str):
        return own
    if isinstance(module, nn.Hardtanh) and module.min_val == 0 and module.max_val == 6:
        return "relu6"
    for base in type(module).__mro__:
        if base in MODULE_OPS:
            inherits = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return MODULE_OPS[base] if inherits else _snake_case(type(module).__name__)
    return _snake_case(type(module).__name__)


def _snake_case(name: str) -> str:
    """AdaptiveAvgPool2d -> adaptive_avg_pool2d, LeakyReLU -> leaky_relu."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()


def node_op(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What a node computes; "placeholder", "get_attr" and "output" for those that compute nothing."""
    if node.op == "call_module":
        return module_op(modules[str(node.target)])
    if node.op in ("call_function", "call_method"):
        return function_name(node.target)
    return node.op


def out_of_place(target: Any) -> Any:
    """The target that computes the same without writing into its input, or None if there is none."""
    if isinstance(target, str):
        return target[:-1] if target.endswith("_") and not target.endswith("__") else None
    if target in _OPERATORS_IN_PLACE:
        return _OPERATORS_IN_PLACE[target]
    if isinstance(target, torch._ops.OpOverload):
        return _pure_overload(target)
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        for namespace in (torch, torch.nn.functional):
            if getattr(namespace, name, None) is target:
                return getattr(namespace, name[:-1], None)
    return None


def _pure_overload(target: torch._ops.OpOverload) -> Any:
    """aten.relu.default for aten.relu_.default, which torch.export gives."""
    name, _, overload = target.__name__.partition(".")
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None) if name.endswith("_") else None
    return getattr(packet, overload, None)


def as_function(node: fx.Node) -> Callable[..., Any]:
    """The function that a call_function or call_method node calls, methods unbound."""
    if node.op == "call_method":
        return getattr(Tensor, str(node.target))  # type: ignore[no-any-return]
    assert callable(node.target)
    return node.target


def is_float_tensor(value: object) -> bool:
    """Whether a value is a tensor of floats."""
    return isinstance(value, Tensor) and value.is_floating_point()


def attribute(root: nn.Module, path: str) -> Any:
    """The value of a get_attr node: what a path such as `encoder.mask` names in a network."""
    *above, last = path.split(".")
    return getattr(root.get_submodule(".".join(above)), last)


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers among a node's arguments, a nest of tuples, lists and dicts, in order."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, dict):
        yield from numbers_in(list(value.values()))
