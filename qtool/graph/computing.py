"""A tracer that computes what it notes, so that Python sees numbers where it needs them."""

from __future__ import annotations

import functools
import inspect
import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qtool.errors import ModelError
from qtool.graph import ops
from qtool.graph.control import expect
from qtool.graph.examples import absent, arguments
from qtool.graph.tracer import LayerTracer

# The size of their result depends on values.
_SIZED_BY_VALUES = frozenset({"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"})
# Functions that make tensors of a size, of which fx would not know.
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent)


class Undecided(BaseException):
    """A run has come to a value that no answer was given for; no `except` of a network stops it."""

    def __init__(self, test: fx.Node, where: str, site: Any) -> None:
        super().__init__(where)
        self.test, self.where, self.site = test, where, site


class _Value(fx.Proxy):
    """A traced value of which Python may know how large it is."""

    tracer: ComputingTracer

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values[self.node]
        if name in ("dtype", "layout", "requires_grad", "is_cuda"):
            return getattr(value, name)
        if name == "device":
            return self.tracer.device_of(self)
        attribute = getattr(value, name)  # an AttributeError is the network's own
        if callable(attribute) and not isinstance(attribute, Tensor):
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, operator.truediv, other)

    def _in_place(self, in_place: Any, pure: Any, other: Any) -> Any:
        is_tensor = isinstance(self.tracer.values[self.node], Tensor)
        return self.tracer.create_proxy("call_function", in_place if is_tensor else pure, (self, other), {})

    def __len__(self) -> int:
        return int(self.tracer.number(self, len, "a length"))

    def __index__(self) -> int:
        return int(self.tracer.number(self, int, "an integer"))

    def __int__(self) -> int:
        return int(self.tracer.number(self, int, "an integer"))

    def __float__(self) -> float:
        return float(self.tracer.number(self, float, "a number"))

    def __iter__(self) -> Iterator[Any]:
        items: Any = self
        return iter([items[index] for index in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        return bool(self.tracer.create_proxy("call_function", _contains, (self, item), {}))


def _contains(container: Any, item: Any) -> bool:
    return item in container


class ComputingTracer(LayerTracer):
    """Traces one way through the code of a network while it runs on an example.

    Args:
        root: the network.
        example: its input.
        answers: to the questions whether a value is true, in order.
    """

    # What is computed from buffers, and decided by them, is part of the graph, as for parameters.
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, example: Any, answers: tuple[bool, ...]) -> None:
        super().__init__(absent(root, example))
        self.answers = list(answers)
        self.values: dict[fx.Node, Any] = {}
        self.by_values: set[fx.Node] = set()
        """numbers, and sizes of tensors, that depend on values"""
        self.devices: dict[int, tuple[torch.device, fx.Node]] = {}
        self.last_where = ""
        self.is_computing = False
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, arguments(example))
        self.inputs = inspect.signature(root.forward).bind(*args, **kwargs).arguments

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    @contextmanager
    def intercepting(self) -> Iterator[None]:
        """Inside, functions that make tensors, such as torch.zeros, are noted when given traced sizes."""
        interceptor = _Interceptor(self)
        with interceptor, interceptor.factories():
            yield

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.is_computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.device) and id(a) in self.devices:
            return self.devices[id(a)][1]
        created = super().create_arg(a)
        if isinstance(a, Tensor) and isinstance(created, fx.Node):
            self._use_earlier_constant(created, a)
            self.values[created] = a
        return created

    def _use_earlier_constant(self, node: fx.Node, value: Tensor) -> None:
        """Give equal constants of several runs one name."""
        if not str(node.target).startswith("_tensor_constant"):
            return
        for name, earlier in vars(self.root).items():
            same_type = name.startswith("_tensor_constant") and earlier.dtype == value.dtype
            if same_type and earlier.shape == value.shape and torch.equal(earlier, value):
                node.target = name
                return

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        node = proxy.node
        if kind == "placeholder":
            self.values[node] = self.inputs.get(str(target))
            return proxy
        for read in node.all_input_nodes:
            if read not in self.values:
                self.values[read] = self._value_of(read)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        self.is_computing = True
        try:
            self.values[node] = self._compute(kind, target, args, kwargs)
        finally:
            self.is_computing = False
        if self._depends_on_values(node):
            self.by_values.add(node)
        return proxy

    def _value_of(self, node: fx.Node) -> Any:
        """The value of a node that create_arg has made: an attribute, or a class of several values."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return self._compute(node.op, node.target, args, kwargs)

    def _compute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return ops.attribute(self.root, target)
        if kind == "call_module":
            return self.root.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _depends_on_values(self, node: fx.Node) -> bool:
        op = "" if node.op == "call_module" else ops.function_name(node.target)
        read = [self.values[n] for n in node.all_input_nodes]
        known = [self.values[n] for n in node.all_input_nodes if n in self.by_values]
        if _holds_tensor(self.values[node]):
            by_mask = op == "getitem" and any(_is_mask(value) for value in read[1:])
            sizes = any(isinstance(value, (Tensor, tuple, list)) for value in known)
            return op in _SIZED_BY_VALUES or by_mask or sizes
        return bool(known) or (any(map(_holds_tensor, read)) and op not in ops.READS_SHAPE)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value, node = self.values[obj.node], obj.node
        where, site = _place()
        self.last_where = where
        if not isinstance(value, Tensor) and node not in self.by_values:
            self.create_proxy("call_function", expect, (obj, value, where), {})
            return bool(value)
        if not self.answers:
            raise Undecided(node, where, site)
        return self.answers.pop(0)

    def number(self, obj: fx.Proxy, convert: Callable[[Any], Any], words: str) -> Any:
        """A value as a number of Python, and every later input is expected to give the same.

        Raises:
            ModelError: if it depends on the values of tensors.
        """
        value, (where, _) = self.values[obj.node], _place()
        if obj.node in self.by_values or (isinstance(value, Tensor) and convert is not len):
            raise ModelError(
                f"{where}: Python uses a value of a tensor as {words}, which differs from input to input; "
                "compute with the tensor itself, as in `if x.mean() > 0`"
            )
        if convert is len and isinstance(value, Tensor):
            shape: Any = obj.shape
            obj, value = shape[0], value.shape[0]
        elif convert is len:
            return len(value)
        self.create_proxy("call_function", expect, (obj, value, where), {})
        return value if convert is len else convert(value)

    def device_of(self, obj: fx.Proxy) -> torch.device:
        """The device of a value; as an argument of a function it is that of the value at run time."""
        device: torch.device = torch.device(self.values[obj.node].device)
        node = self.create_proxy("call_function", getattr, (obj, "device"), {}).node
        self.devices[id(device)] = (device, node)
        return device


class _Interceptor(TorchFunctionMode):
    """Notes calls that no traced tensor is an argument of, but a traced size or device."""

    def __init__(self, tracer: ComputingTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.is_computing or not any(map(self._is_traced, _leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self.tracer.create_proxy("call_function", operator.getitem, args, kwargs)
        if torch.overrides.is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)

    def _is_traced(self, leaf: Any) -> bool:
        noted = isinstance(leaf, torch.device) and id(leaf) in self.tracer.devices
        return noted or isinstance(leaf, fx.Proxy)

    @contextmanager
    def factories(self) -> Iterator[None]:
        """Inside, functions that refuse traced sizes before a mode could see them are noted too."""
        originals = {name: getattr(torch, name) for name in _FACTORIES}
        try:
            for name, function in originals.items():
                setattr(torch, name, functools.partial(self._call, function))
            yield
        finally:
            for name, function in originals.items():
                setattr(torch, name, function)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(function, (), args, kwargs)


def _leaves(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value)
    parts = [
        part for leaf in leaves if isinstance(leaf, slice) for part in (leaf.start, leaf.stop, leaf.step)
    ]
    return leaves + parts


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _place() -> tuple[str, Any]:
    """The line of the network's code that is running, and what tells it from others and other callers."""
    frame: FrameType | None = sys._getframe(1)
    own = []
    while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
        if not is_library(frame.f_code.co_filename):
            own.append(frame)
        frame = frame.f_back
    if not own:
        return "the network", ()
    site = tuple((f.f_code.co_filename, f.f_code.co_name, f.f_lasti) for f in own)
    return named_line(own[0].f_code.co_filename, own[0].f_lineno), site


@functools.cache
def is_library(filename: str) -> bool:
    return any(Path(filename).is_relative_to(folder) for folder in _LIBRARIES) or filename.startswith("<")


def named_line(filename: str, line: int) -> str:
    text = linecache.getline(filename, line).strip()
    return f"{filename}:{line} ({text})" if text else f"{filename}:{line}"
