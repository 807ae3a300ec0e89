"""Networks whose code depends on the values of tensors: every way through the code, traced and joined.

The network's own forward runs on the example, and each operation on a value that comes from the input
is noted as a node, as torch.fx notes it, and computed. So Python sees numbers where it needs them:
`range(x.shape[1])` works, and a number that was used so is expected of every later input.

Where Python asks whether a value of a tensor is true (`if x.sum() > 0`, `while x.norm() > 1`), the run
ends, and forward runs again, once for each answer. The answers, not the example, say where the code
goes, so a network has the same graph whatever its weights. A branch that raises is refused when an
input takes it, with the line; so is a loop of more than MAX_ROUNDS rounds. What a branch computes in
Python stays with the branch: two are joined only where all that follows is the same (see merge.py).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qtool.errors import ModelError
from qtool.graph.computing import ComputingTracer, Undecided, is_library, named_line
from qtool.graph.merge import Choice, Statement, Step, choose, graph_of, step_of
from qtool.graph.pure import make_pure
from qtool.graph.tracer import LayerTracer

# How often one line may decide on one way through the code; more rounds of a loop are refused.
MAX_ROUNDS = 16
# How many ways through the code a network may have.
MAX_PATHS = 64


class _NoWay(Exception):
    """There is no way through the code with the answers given so far."""


def by_paths(root: nn.Module, example: Any) -> fx.GraphModule:
    """The graph of all ways through the code of a network.

    Raises:
        ModelError: if there are too many, or none; the message names the line.
    """
    explorer = _Explorer(root, example)
    try:
        statements = explorer.explore((), [], [])
    except _NoWay as error:
        raise ModelError(str(error)) from error.__cause__
    return fx.GraphModule(root, graph_of(statements, LayerTracer), class_name=type(root).__name__)


@dataclass
class _Explorer:
    """Runs a network once for each way through its code."""

    root: nn.Module
    example: Any
    runs: int = 0

    def explore(self, answers: tuple[bool, ...], before: list[Step], sites: list[Any]) -> list[Statement]:
        """What follows the answers to the first questions, up to the output.

        Args:
            answers: so far.
            before: the steps that led there.
            sites: where the questions were.
        """
        tracer, end = self._run(answers)
        steps = self._steps(tracer, before)
        new: list[Statement] = list(steps[len(before) :])
        if end is None:
            return new
        if sites.count(end.site) >= MAX_ROUNDS:
            raise _NoWay(f"{end.where}: more than {MAX_ROUNDS} rounds; qtool captures loops of so many")
        nodes = dict(zip(tracer.graph.nodes, steps, strict=True))
        refusals, branches = {}, {}
        for answer in (False, True):
            try:
                branches[answer] = self.explore((*answers, answer), steps, [*sites, end.site])
            except _NoWay as error:
                refusals[answer] = str(error)
                cause = error
        if not branches:
            raise cause
        return new + choose(Choice(nodes[end.test], end.where, end.site, refusals), branches)

    def _run(self, answers: tuple[bool, ...]) -> tuple[ComputingTracer, Undecided | None]:
        tracer = ComputingTracer(self.root, self.example, answers)
        end = None
        try:
            with torch.no_grad(), tracer.intercepting():
                tracer.trace(self.root)
            self.runs += 1
        except Undecided as question:
            end = question
        except Exception as error:
            raise _NoWay(f"{_line_of(error)}{_one_line(error)}") from error
        if self.runs > MAX_PATHS:
            raise ModelError(
                f"{tracer.last_where}: the network has more than {MAX_PATHS} ways through its code, by the "
                "values of tensors; compute with torch.where what does not differ in cost"
            )
        make_pure(tracer.graph, dict(self.root.named_modules(remove_duplicate=False)))
        if end is None:
            self._check(tracer)
        return tracer, end

    def _check(self, tracer: ComputingTracer) -> None:
        """See that a way through the code gives, without operations in place, what the code gave."""
        placeholders = [node for node in tracer.graph.nodes if node.op == "placeholder"]
        fresh = ComputingTracer(self.root, self.example, ())
        inputs = [fresh.inputs.get(str(node.target)) for node in placeholders]
        (output,) = (node for node in tracer.graph.nodes if node.op == "output")
        wanted = fx.node.map_arg(output.args[0], tracer.values.__getitem__)
        with torch.no_grad():
            found = fx.Interpreter(self.root, graph=tracer.graph).run(*inputs, enable_io_processing=False)
        pairs = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True)
        for a, b in pairs:
            if isinstance(a, Tensor) and not torch.allclose(a, b, atol=1e-5, rtol=1e-4, equal_nan=True):
                raise ModelError(
                    f"{tracer.last_where}: behind this, the network's code computes something else when it "
                    "runs again: it is random, or writes into a tensor that it also has under another name; "
                    "write `y = y + x` for `y += x` there"
                )

    def _steps(self, tracer: ComputingTracer, before: list[Step]) -> list[Step]:
        known: dict[fx.Node, Step] = {}
        steps = []
        for index, node in enumerate(tracer.graph.nodes):
            if index < len(before):
                step = before[index]
                if step.target != node.target:
                    raise ModelError(
                        "the network's code runs differently each time, so it cannot be captured; "
                        "take randomness and state out of its forward"
                    )
            else:
                value = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), tracer.values.get(node))
                step = step_of(node, known.__getitem__, value)
            known[node] = step
            steps.append(step)
        return steps


def _line_of(error: Exception) -> str:
    if isinstance(error, ModelError):
        return ""  # it says so itself
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    own = [f for f in frames if not is_library(f.filename)]
    return f"{named_line(own[-1].filename, own[-1].lineno)}: " if own else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return (
        text if isinstance(error, ModelError) else f"the network's code raised {type(error).__name__}: {text}"
    )
