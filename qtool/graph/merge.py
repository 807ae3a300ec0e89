"""The branches of a network's code as one graph, joined again where they do the same.

What a network does on one way through its code is a list of steps, which ends at a choice, where a
value decides how it goes on, or at the output. The two lists behind a choice are compared from the
end: the longest stretch that does the same in both is behind the choice only once, and reads the
values of the branch that was taken. So `y = a(x) if x.sum() > 0 else b(x)` and `return fc(y)` give
one layer `fc`, as the code has it. Since all that follows on either side is compared, joining never
changes what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from qtool.errors import ModelError
from qtool.graph.control import decide, pick, steer


@dataclass(eq=False)
class Step:
    """One node of a graph to be; args and kwargs hold the steps and choices that it reads."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    path: str
    value: Any


@dataclass(eq=False)
class Choice:
    """A place where a value decides how the code goes on.

    Args:
        test: gives the value.
        where: file and line of the code.
        site: tells apart two choices of one line.
        refusals: why there is no branch for an outcome.
        branches: what runs before both are joined; empty for an outcome without a branch.
    """

    test: Step
    where: str
    site: Any
    refusals: Mapping[bool, str]
    branches: dict[bool, list[Statement]] = field(default_factory=dict)


Statement = Step | Choice


def choose(choice: Choice, branches: dict[bool, list[Statement]]) -> list[Statement]:
    """A choice and all that follows it, what both branches end with joined.

    Args:
        choice: without branches.
        branches: what follows each outcome, up to the output; one of them may be missing.

    Raises:
        ModelError: if the branches give outputs that cannot be one, such as a tensor and a tuple.
    """
    if len(branches) == 1:
        (outcome,) = branches
        choice.branches = {}
        return [choice, *branches[outcome]]
    yes, no = branches[True], branches[False]
    join = _Join(choice, yes, no)
    count = join.longest()
    if count == 0:
        raise ModelError(f"{choice.where}: the branches return values that differ in number or kind")
    choice.branches = {True: yes[: len(yes) - count], False: no[: len(no) - count]}
    tail = join.merged(count)
    return [choice, *join.picks.values(), *tail]


class _Join:
    """Finds what two lists of statements end with in common."""

    def __init__(self, choice: Choice, yes: list[Statement], no: list[Statement]) -> None:
        self.choice, self.yes, self.no = choice, yes, no
        self.partners: dict[Statement, Statement] = {}
        self.picks: dict[tuple[Statement, Statement], Step] = {}

    def longest(self) -> int:
        """The number of statements that both lists end with, read on values that a pick can give."""
        count = 0
        for a, b in zip(reversed(self.yes), reversed(self.no), strict=False):
            if not _alike(a, b):
                break
            count += 1
        while count and (fewer := self._consistent(count)) < count:
            count = fewer
        return count

    def _pairs(self, count: int) -> list[tuple[Statement, Statement]]:
        return list(zip(self.yes[len(self.yes) - count :], self.no[len(self.no) - count :], strict=True))

    def _consistent(self, count: int) -> int:
        """How many of the last count statements stay when what contradicts the pairing is left out."""
        pairs = self._pairs(count)
        places = {
            part: index
            for index, pair in enumerate(pairs)
            for statement in pair
            for part in _inside(statement)
        }
        self.partners = {
            a: b for pair in pairs for a, b in zip(*(_inside(statement) for statement in pair), strict=True)
        }
        for index, (first, second) in enumerate(pairs):
            for a, b in zip(_inside(first), _inside(second), strict=True):
                for u, v in zip(_read(a), _read(b), strict=True):
                    if (u in places or v in places) and self.partners.get(u) is not v:
                        inner = max(places.get(u, -1), places.get(v, -1))
                        return count - inner - 1 if inner < index else count - index - 1
                    if u not in places and not _can_pick(u, v, lenient=_is_output(a)):
                        return count - index - 1
        return count

    def merged(self, count: int) -> list[Statement]:
        """The common statements, made to read what the branches differ in through picks."""
        pairs = self._pairs(count)
        for pair in pairs:
            for a, b in zip(*(_inside(statement) for statement in pair), strict=True):
                self._merge(a, b)
        return [a for a, _ in pairs]

    def _merge(self, a: Statement, b: Statement) -> None:
        others = iter(_read(b))

        def taken(value: Any) -> Any:
            if not isinstance(value, (Step, Choice)):
                return value
            other = next(others)
            same = value is other or self.partners.get(value) is other
            return value if same else self._pick(value, other)

        if isinstance(a, Choice):
            a.test = taken(a.test)
        else:
            a.args, a.kwargs = map_aggregate(a.args, taken), map_aggregate(a.kwargs, taken)

    def _pick(self, yes: Statement, no: Statement) -> Step:
        if (yes, no) not in self.picks:
            assert isinstance(yes, Step)
            self.picks[yes, no] = Step(
                "call_function", pick, (self.choice, yes, no), {}, "pick", yes.path, yes.value
            )
        return self.picks[yes, no]


def _is_output(statement: Statement) -> bool:
    return isinstance(statement, Step) and statement.op == "output"


def _inside(statement: Statement) -> Iterator[Statement]:
    """A statement and those in its branches, the False one first."""
    yield statement
    if isinstance(statement, Choice):
        for outcome in sorted(statement.branches):
            for part in statement.branches[outcome]:
                yield from _inside(part)


def _read(statement: Statement) -> list[Statement]:
    """What a statement reads itself, in order."""
    if isinstance(statement, Choice):
        return [statement.test]
    found: list[Statement] = []

    def note(value: Any) -> Any:
        if isinstance(value, (Step, Choice)):
            found.append(value)
        return value

    map_aggregate((statement.args, statement.kwargs), note)
    return found


def _alike(a: Statement, b: Statement) -> bool:
    """Whether two statements do the same, on whatever values."""
    if isinstance(a, Choice) and isinstance(b, Choice):
        same = (a.site, a.refusals, a.branches.keys()) == (b.site, b.refusals, b.branches.keys())
        return same and all(_all_alike(a.branches[o], b.branches[o]) for o in a.branches)
    if isinstance(a, Choice) or isinstance(b, Choice):
        return False
    if (a.op, a.target) != (b.op, b.target) or _constants(a) != _constants(b):
        return False
    return _is_output(a) or _kind(a.value) == _kind(b.value)


def _all_alike(a: list[Statement], b: list[Statement]) -> bool:
    return len(a) == len(b) and all(map(_alike, a, b))


def _constants(step: Step) -> Any:
    """The arguments of a step, with a mark for each that is computed; 1, 1.0 and True differ."""

    def mark(value: Any) -> Any:
        return "read" if isinstance(value, (Step, Choice)) else (type(value), value)

    return map_aggregate((step.args, step.kwargs), mark)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return [_kind(v) for v in value] if isinstance(value, (tuple, list)) else type(value)


def _can_pick(a: Statement, b: Statement, lenient: bool) -> bool:
    if a is b:
        return True
    if isinstance(a, Choice) or isinstance(b, Choice):
        return False
    return lenient or _kind(a.value) == _kind(b.value)


def graph_of(statements: list[Statement], tracer: type[fx.Tracer]) -> fx.Graph:
    """The graph that runs as the statements say, each node with its path and its guard."""
    graph = fx.Graph(tracer_cls=tracer)
    _Emitter(graph).emit(statements, ())
    steer(graph)
    return graph


class _Emitter:
    """Appends statements to a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: dict[Statement, fx.Node] = {}
        self.choices = 0

    def emit(self, statements: list[Statement], guard: tuple[tuple[int, bool], ...]) -> None:
        """Append statements that run when the decisions of guard came out as it says."""
        for statement in statements:
            if isinstance(statement, Step):
                self._add(statement, guard)
                continue
            number, self.choices = self.choices, self.choices + 1
            why = [statement.refusals.get(outcome) for outcome in (False, True)]
            args = (statement.test, number, statement.where, *why)
            step = Step("call_function", decide, args, {}, "decide", statement.test.path, True)
            self.nodes[statement] = self._add(step, guard)
            for outcome, branch in sorted(statement.branches.items(), reverse=True):
                self.emit(branch, (*guard, (number, outcome)))

    def _add(self, step: Step, guard: tuple[tuple[int, bool], ...]) -> fx.Node:
        def node_of(value: Any) -> Any:
            return self.nodes[value] if isinstance(value, (Step, Choice)) else value

        args, kwargs = (map_aggregate(part, node_of) for part in (step.args, step.kwargs))
        node = self.graph.create_node(step.op, step.target, args, kwargs, step.name)
        node.meta["path"] = step.path
        if guard:
            node.meta["guard"] = guard
        self.nodes[step] = node
        return node


def step_of(node: fx.Node, steps: Callable[[fx.Node], Any], value: Any) -> Step:
    """The step of a node that reads other steps."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), steps)
    return Step(node.op, node.target, args, kwargs, node.name, node.meta.get("path", ""), value)
