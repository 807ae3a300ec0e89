"""Run a graph on several batches one node at a time, all batches at each node.

So a layer can be looked at, and replaced, while everything in front of it has run and nothing behind it
has; and what it reads exists for all batches at once. Values are freed as soon as nothing needs them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from qtool.graph.examples import placeholder_values


class Walk:
    """A network and the batches that go through it together.

    Modules of the network may be replaced until they have run; its graph may not change.

    Args:
        network: the graph.
        batches: its inputs, as graph.examples takes them, on its device.
        keep: nodes whose values are never freed.
    """

    def __init__(
        self, network: fx.GraphModule, batches: Sequence[Any], keep: Collection[fx.Node] = ()
    ) -> None:
        self.network = network
        self._keep = frozenset(keep)
        self._nodes = list(network.graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._next = 0
        self._interpreter = fx.Interpreter(network, garbage_collect_values=False)
        self._values: list[dict[fx.Node, Any]] = []
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        for batch in batches:
            found = placeholder_values(network, batch)
            self._values.append(dict(zip(inputs, found, strict=True)))

    def before(self, node: fx.Node) -> None:
        """Run everything in front of a node, and not the node.

        Raises:
            ValueError: if it has run already.
        """
        if self._place[node] < self._next:
            raise ValueError(f"the walk is past {node.name}")
        self._run_to(self._place[node])

    def past(self, node: fx.Node) -> None:
        """Run everything up to a node, and the node; nothing where it has run already."""
        self._run_to(max(self._next, self._place[node] + 1))

    def arguments(self, node: fx.Node) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What a node is called with, for each batch; the walk must stand in front of it.

        The tensors are the walk's own: they are not to be written to.
        """
        found = []
        for values in self._values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            found.append((tuple(args), dict(kwargs)))
        return found

    def values(self, node: fx.Node) -> list[Any]:
        """What a node gave for each batch.

        Raises:
            KeyError: if it has not run, or its value was freed.
        """
        return [values[node] for values in self._values]

    def alive(self) -> list[dict[fx.Node, Any]]:
        """The values that something ahead still reads, for each batch; the tensors are the walk's own."""
        return [dict(values) for values in self._values]

    def has_run(self, node: fx.Node) -> bool:
        """Whether the walk is past a node."""
        return self._place[node] < self._next

    def ahead(self, node: fx.Node) -> Iterator[Any]:
        """What a node will give for each batch, if nothing that it needs changes; the walk stays where it is.

        Raises:
            KeyError: if what it needs, or its own value, was freed.
        """
        self._interpreter.submodules = dict(self.network.named_modules())
        for values in self._values:
            with torch.no_grad():
                yield self._value(node, dict(values))

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """A node's value, with all that it needs and that has not run yet; these are added to values."""
        if node not in values:
            if self.has_run(node):
                raise KeyError(node)
            for source in node.all_input_nodes:
                self._value(source, values)
            self._interpreter.env = values
            values[node] = self._interpreter.run_node(node)
        return values[node]

    def _run_to(self, place: int) -> None:
        # Modules that were replaced since are looked up by name, as the interpreter does anew each time.
        self._interpreter.submodules = dict(self.network.named_modules())
        with torch.no_grad():
            for here in range(self._next, place):
                node = self._nodes[here]
                if node.op in ("placeholder", "output"):
                    continue
                done = [
                    source
                    for source in {*node.all_input_nodes, node}
                    if source not in self._keep and all(self._place[user] <= here for user in source.users)
                ]
                for values in self._values:
                    self._interpreter.env = values
                    values[node] = self._interpreter.run_node(node)
                    for source in done:
                        values.pop(source, None)
        self._next = place
