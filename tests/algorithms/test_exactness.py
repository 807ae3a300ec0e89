import pytest
import torch
from torch import nn

from qtool.algorithms.exactness import check_unchanged
from qtool.errors import ModelError
from qtool.graph.edit import replace_layers, with_parameters
from qtool.graph.trace import trace


def test_the_same_network_is_unchanged(tiny_net, tiny_batches):
    traced = trace(tiny_net, tiny_batches[0])
    assert check_unchanged(traced, traced, tiny_batches[0]) == 0.0


@pytest.mark.parametrize(("factor", "ok"), [(1 + 5e-5, True), (1.001, False)])
def test_a_change_of_the_output_is_measured_and_refused(factor, ok):
    traced = trace(nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(2, 4))
    layer = traced.get_submodule("0")
    other = replace_layers(traced, {"0": with_parameters(layer, weight=layer.weight * factor)})
    if ok:
        assert check_unchanged(traced, other, torch.randn(5, 4)) == pytest.approx(factor - 1, rel=0.05)
    else:
        with pytest.raises(ModelError, match=r"changed its output by 1\.0e-03 of the largest"):
            check_unchanged(traced, other, torch.randn(5, 4))


def test_nan_is_no_difference_of_zero():
    traced = trace(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    layer = traced.get_submodule("0")
    broken = replace_layers(traced, {"0": with_parameters(layer, weight=layer.weight * torch.nan)})
    for before, after in ((traced, broken), (broken, traced)):
        with pytest.raises(ModelError):
            check_unchanged(before, after, torch.randn(5, 4))
