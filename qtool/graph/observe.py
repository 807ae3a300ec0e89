"""Attach observers to a traced network, and always detach them.

Every tensor is observed once: a layer's input is its producer's output, and is filed under both
names. Only inputs that no layer produced (the network's own, or the result of a reshape) get an
observer of their own, one for all their readers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from qtool.errors import StatsError
from qtool.graph import ops
from qtool.graph.trace import float_tensors, is_mask, layers, tensor_inputs
from qtool.graph.unbounded import is_unbounded
from qtool.observers.moments import MomentsObserver
from qtool.observers.stats import LayerStats, ModelStats


@dataclass(frozen=True)
class Observation:
    """Which observer watches which tensor of a network: one for each producing node."""

    traced: fx.GraphModule
    observers: dict[fx.Node, MomentsObserver]

    def start_second_pass(self) -> None:
        """Tell every observer that the data starts again."""
        for observer in self.observers.values():
            observer.start_second_pass()

    def stats(self) -> ModelStats:
        """The records of all layers, each tensor filed under every name it has."""
        found = {node: observer.stats() for node, observer in self.observers.items()}
        return ModelStats(
            {
                name: LayerStats(
                    {i: found[source] for i, source in enumerate(tensor_inputs(node)) if source in found},
                    found.get(node),
                )
                for name, node, _ in layers(self.traced)
            }
        )


@contextmanager
def observe(traced: fx.GraphModule) -> Iterator[Observation]:
    """Watch every layer's inputs and output while batches run inside the `with` block.

    Raises:
        StatsError: from the run, if a layer gives NaN or infinity.
    """
    observers: dict[fx.Node, MomentsObserver] = {}
    handles: list[RemovableHandle] = []
    produced = {
        node
        for _, node, _ in layers(traced)
        if ops.is_float_tensor(node.meta["value"]) and not is_unbounded(node)
    }
    try:
        for name, node, module in layers(traced):
            fresh = [
                (i, s)
                for i, s in enumerate(tensor_inputs(node))
                if s not in produced and s not in observers and not is_mask(node, i)
            ]
            for _, source in fresh:
                observers[source] = MomentsObserver()
            if fresh:
                handles.append(_watch_inputs(name, module, [(i, observers[s]) for i, s in fresh]))
            if node in produced:
                observers[node] = MomentsObserver()
                handles.append(_watch_output(name, module, observers[node]))
        yield Observation(traced, observers)
    finally:
        for handle in handles:
            handle.remove()


def _watch_inputs(
    name: str, module: nn.Module, observers: list[tuple[int, MomentsObserver]]
) -> RemovableHandle:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = float_tensors((args, kwargs))
        for index, observer in observers:
            _update(observer, tensors[index], f"the input {index} of layer {name!r}")

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _watch_output(name: str, module: nn.Module, observer: MomentsObserver) -> RemovableHandle:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        _update(observer, output, f"the output of layer {name!r}")

    return module.register_forward_hook(hook)


def _update(observer: MomentsObserver, x: Tensor, where: str) -> None:
    try:
        observer.update(x)
    except ValueError as error:
        raise StatsError(f"calibration: {where} holds {error}; check the weights and the images") from error
