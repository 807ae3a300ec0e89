"""Branches and loops in a graph: nodes that decide, nodes that are skipped, nodes that run again.

A graph of torch.fx is a straight line. Here some of its nodes steer what runs:

    decide       takes a branch by a value; nodes with meta["guard"], pairs of the number of a decision
                 and an outcome, run only when all of these came out so
    pick         the value of the branch that was taken
    expect       refuses an input on which Python would have gone another way than on the example
    begin_steps  a step of a sequence; what follows, up to end_steps, runs once for each step
    carry, keep  a value that one step hands to the next
    end_steps    the outputs of all steps as a sequence

Run one after the other, as by fx.Interpreter, they give values of the right shapes: every branch runs,
and every loop once. `steer` gives a graph the code that honours them. What reads the result of a
skipped node is skipped too, so nodes that are inserted behind others need no guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from qtool.errors import ModelError

Guard = tuple[tuple[int, bool], ...]


class UncapturedPath(ModelError):
    """An input on which the network's code goes where its graph has no nodes."""


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make calls with traced values a node of the graph that dead-code elimination leaves alone."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.overrides.has_torch_function(args):
            return torch.overrides.handle_torch_function(call, args, *args)
        return function(*args)

    has_side_effect(call)
    return call


@_recorded
def decide(test: Any, _number: int, _where: str, if_false: str | None, if_true: str | None) -> bool:
    """The truth of a value; if_false and if_true say why there is no branch for it.

    Raises:
        UncapturedPath: if there is no branch for it.
    """
    outcome = bool(test)
    refusal = if_true if outcome else if_false
    if refusal is not None:
        raise UncapturedPath(refusal)
    return outcome


@_recorded
def expect(value: Any, on_example: Any, where: str) -> Any:
    """A number that Python used as it was on the example, and which may not differ.

    Raises:
        UncapturedPath: if it does.
    """
    if value != on_example:
        raise UncapturedPath(
            f"{where}: the network was captured with {on_example!r} here, and found {value!r}; give all "
            "batches that size, or capture it with an example of the other one"
        )
    return value


@_recorded
def pick(decision: bool, if_true: Any, if_false: Any) -> Any:
    """The value of the branch that was taken."""
    return if_true if decision else if_false


@_recorded
def begin_steps(x: Tensor, axis: int, backwards: bool) -> Tensor:
    """One step of a sequence, without axis: the first that a loop takes."""
    if x.shape[axis] == 0:
        raise ModelError("a recurrent layer was given a sequence without steps; leave empty sequences out")
    return x.select(axis, -1 if backwards else 0)


@_recorded
def carry(_step: Tensor, initial: Tensor, _name: str) -> Tensor:
    """What the step before kept under a name; initial in the first."""
    return initial


@_recorded
def keep(_step: Tensor, value: Tensor, _name: str) -> Tensor:
    """Hand a value to the next step."""
    return value


@_recorded
def end_steps(_step: Tensor, output: Tensor, x: Tensor, axis: int) -> Tensor:
    """The outputs of all steps of the sequence x, stacked along axis, in its order."""
    return torch.stack([output] * x.shape[axis], axis)


@_recorded
def last_kept(_sequence: Tensor, value: Tensor, _name: str) -> Tensor:
    """What the last step kept under a name; value is what the first one did."""
    return value


STEERING = (decide, expect, pick, begin_steps, carry, keep, end_steps, last_kept)


def is_steered(graph: fx.Graph) -> bool:
    """Whether a graph has nodes of this file."""
    return any(node.op == "call_function" and node.target in STEERING for node in graph.nodes)


def has_decisions(graph: fx.Graph) -> bool:
    """Whether values decide what a graph runs."""
    return any(node.target is decide for node in graph.nodes)


def steer(graph: fx.Graph) -> None:
    """Make graph modules of a graph, and of its copies, run as its decisions and loops say."""
    if is_steered(graph):
        graph.set_codegen(_SteeredCode())


class _SteeredCode(fx.graph.CodeGen):
    """Generates a forward that hands over to `_run`."""

    def _gen_python_code(self, nodes: Any, *_args: Any, **_settings: Any) -> fx.graph.PythonCode:
        run = functools.partial(_run, _Program.of(list(nodes)))
        source = "def forward(self, *args, **kwargs):\n    return run(self, args, kwargs)\n"
        return fx.graph.PythonCode(source, {"run": run}, None)


class _Absent:
    """The result of a node that was skipped."""


ABSENT = _Absent()


@dataclass(frozen=True)
class _Program:
    """The nodes of a graph in order, and after which of them a value is no longer needed.

    Args:
        nodes: in order.
        last_readers: for the number of a node, the values that it reads as the last one.
        begins: number of an end_steps -> number of its begin_steps.
    """

    nodes: list[fx.Node]
    last_readers: Mapping[int, list[fx.Node]]
    begins: Mapping[int, int]

    @classmethod
    def of(cls, nodes: list[fx.Node]) -> _Program:
        numbers = {node: index for index, node in enumerate(nodes)}
        begins = {numbers[n]: numbers[n.args[0]] for n in nodes if n.target is end_steps}  # type: ignore[index]
        readers: dict[int, list[fx.Node]] = {}
        for node, number in numbers.items():
            last = max((numbers[user] for user in node.users), default=number)
            # A value from before a loop is read in every round.
            for end, begin in begins.items():
                last = end if number < begin < last < end else last
            readers.setdefault(last, []).append(node)
        return cls(nodes, readers, begins)


@dataclass
class _Loop:
    """Where a loop is."""

    sequence: Tensor
    axis: int
    backwards: bool
    done: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def step(self) -> Tensor:
        """The step that is being taken."""
        length = self.sequence.shape[self.axis]
        return self.sequence.select(self.axis, length - 1 - self.done if self.backwards else self.done)

    def finish(self, output: Tensor) -> Tensor | None:
        """End a step; the outputs of all if it was the last."""
        self.outputs.append(output)
        self.done += 1
        if self.done < self.sequence.shape[self.axis]:
            return None
        return torch.stack(self.outputs[::-1] if self.backwards else self.outputs, self.axis)


class _Run:
    """One run of a program."""

    def __init__(self, program: _Program, module: fx.GraphModule, inputs: Iterable[Any]) -> None:
        self.program, self.module, self.inputs = program, module, iter(inputs)
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.values: dict[fx.Node, Any] = {}
        self.outcomes: dict[int, bool] = {}
        self.loops: dict[fx.Node, _Loop] = {}

    def result(self) -> Any:
        """What the network gives."""
        number, value = 0, None
        while number < len(self.program.nodes):
            node = self.program.nodes[number]
            value = ABSENT if self._is_skipped(node) else self._value(node)
            begin = self.program.begins.get(number)
            if begin is not None and value is None:  # another step
                self.values[self.program.nodes[begin]] = self.loops[self.program.nodes[begin]].step()
                number = begin + 1
                continue
            self.values[node] = value
            for read in self.program.last_readers.get(number, ()):
                self.values.pop(read, None)
            number += 1
        return value

    def _is_skipped(self, node: fx.Node) -> bool:
        guard: Guard = node.meta.get("guard", ())
        if any(self.outcomes.get(number) is not outcome for number, outcome in guard):
            return True
        return node.target is not pick and any(self.values[n] is ABSENT for n in node.all_input_nodes)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self.inputs)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "get_attr":
            above, _, name = str(node.target).rpartition(".")
            return getattr(self.modules[above], name)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.target in STEERING:
            return self._steer(node, args)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _steer(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        value = node.target(*args)  # type: ignore[operator]
        if node.target is decide:
            self.outcomes[args[1]] = value
        elif node.target is begin_steps:
            self.loops[node] = _Loop(*args)
        elif node.target is carry:
            value = self._loop(node).kept.get(args[2], value)
        elif node.target is keep:
            self._loop(node).kept[args[2]] = value
        elif node.target is end_steps:
            value = self._loop(node).finish(args[1])
        elif node.target is last_kept:
            end = node.args[0]
            assert isinstance(end, fx.Node)
            value = self._loop(end).kept[args[2]]
        return value

    def _loop(self, node: fx.Node) -> _Loop:
        begin = node.args[0]
        assert isinstance(begin, fx.Node)
        return self.loops[begin]


def _run(program: _Program, module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    placeholders = [node for node in program.nodes if node.op == "placeholder"]
    given = iter(args)
    inputs = [
        kwargs[str(n.target)] if n.target in kwargs else next(given, n.args[0] if n.args else ABSENT)
        for n in placeholders
    ]
    missing = [str(n.target) for n, value in zip(placeholders, inputs, strict=True) if value is ABSENT]
    if missing or next(given, ABSENT) is not ABSENT:
        names = ", ".join(str(n.target) for n in placeholders)
        raise TypeError(f"the network takes {names}; found {len(args)} arguments and {sorted(kwargs)}")
    return _Run(program, module, inputs).result()
