"""Sequences of layers whose batch norms do something, and a trace in one call."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from qtool.graph.trace import trace


def give_statistics(net: nn.Module) -> nn.Module:
    """Batch norms with seeded statistics, scales and shifts of their own; the network in eval mode."""
    generator = torch.Generator().manual_seed(3)
    for bn in net.modules():
        if getattr(bn, "running_var", None) is None:
            continue
        bn.running_mean.normal_(generator=generator)
        bn.running_var.uniform_(0.5, 2.0, generator=generator)
        if bn.weight is not None:
            nn.init.uniform_(bn.weight, 0.5, 2.0, generator)
            nn.init.normal_(bn.bias, generator=generator)
    return net.eval()


@pytest.fixture
def warm() -> Callable[[nn.Module], nn.Module]:
    return give_statistics


@pytest.fixture
def traced_lambda() -> Callable[..., fx.GraphModule]:
    """Trace a network whose forward is a function of its modules and x."""

    def make(
        forward: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...], **modules: nn.Module
    ) -> fx.GraphModule:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, module in modules.items():
                    self.add_module(name, module)

        Net.forward = lambda self, x: forward(self, x)
        return trace(give_statistics(Net()), torch.rand(shape) - 0.5)

    return make
