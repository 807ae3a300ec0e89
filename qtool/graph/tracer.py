"""torch.fx's tracer, with the leaves that qtool wants and the path of each node's module."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torchvision.ops import DeformConv2d, FrozenBatchNorm2d, StochasticDepth

# torchvision's own modules that symbolic tracing must not enter.
LEAF_CLASSES = (StochasticDepth, FrozenBatchNorm2d, DeformConv2d)


class LayerTracer(fx.Tracer):
    """fx's tracer, which also notes for each node the path of the module that it came from.

    Args:
        fixed: parameters of the network's forward that keep a value, and are no inputs.
    """

    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.fixed = fixed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if hasattr(m, "qtool_op") or isinstance(m, LEAF_CLASSES):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, values = super().create_args_for_root(*args, **kwargs)
        for index, value in enumerate(values):
            if isinstance(value, fx.Proxy) and value.node.target in self.fixed:
                values[index] = self.fixed[str(value.node.target)]
                self.graph.erase_node(value.node)
        return function, values

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["path"] = self.scope.module_path
        return proxy
