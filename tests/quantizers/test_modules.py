"""Modules on integers, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qtool
from qtool.config import QuantizeConfig
from qtool.numerics.spec import QParams, QuantSpec
from qtool.quantizers.rescaling import QuantAdd, QuantAddOnce

SPEC = QuantSpec.from_mode("asym_u", 8)


def grid(scale: float) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(0.0), SPEC)


def test_a_sum_that_is_rounded_once_keeps_what_its_summands_lose():
    # 0.5 + 0.25 steps of the output: each rounds to 0, their sum to 1.
    inputs = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    grids = [grid(0.5), grid(0.25)], grid(1.0)
    assert QuantAdd(*grids, None, 32)(*inputs).tolist() == [0.0, 2.0]
    assert QuantAddOnce(*grids, None, 32)(*inputs).tolist() == [1.0, 2.0]


def test_a_sum_of_tensors_that_broadcast_is_rounded_once_too():
    add = QuantAddOnce([grid(0.5), grid(0.25)], grid(1.0), None, 32)
    assert add(torch.ones(2, 1), torch.ones(1, 3)).tolist() == [[1.0] * 3] * 2


@given(st.lists(st.integers(0, 255), min_size=1, max_size=50), st.floats(0.01, 3), st.floats(0.01, 3))
def test_a_sum_that_is_rounded_once_is_off_by_half_a_step_at_most(values, first, second):
    x = torch.tensor(values, dtype=torch.float32)
    add = QuantAddOnce([grid(first), grid(second)], grid(8.0), None, 32)
    exact = (x.double() * first + x.flip(0).double() * second) / 8.0
    assert float((add(x, x.flip(0)).double() - exact.clamp(0, 255)).abs().max()) <= 0.5 + 1e-4
    assert x.tolist() == values  # the inputs are left alone


def test_a_network_rounds_its_sums_as_asked(tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    asked = [QuantizeConfig(mode="asym_u", bits_activations=4, add_rounding=r) for r in ("inputs", "sum")]
    models = [qtool.quantize(tiny_net, stats, config) for config in asked]
    assert [model.plan.layers["add"].sum_once for model in models] == [False, True]
    each, once = (model.integers(torch.cat(tiny_batches)) for model in models)
    assert torch.equal(each["depthwise"], once["depthwise"])
    off = (each["add"] - once["add"]).abs()
    assert 0 < float(off.double().mean()) < 0.5 and int(off.max()) == 1


def test_a_checkpoint_keeps_how_sums_are_rounded(tiny_net, tiny_batches, tmp_path):
    config = QuantizeConfig(mode="asym_u", bits_activations=4, add_rounding="sum")
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches), config)
    x = tiny_batches[0]
    again = qtool.load(qtool.save(model, tmp_path / "q.pth.tar"), tiny_net, x)
    assert again.plan.layers["add"].sum_once
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("rounding", ["inputs", "sum"])
def test_both_ways_agree_where_summands_are_on_the_grid_of_the_sum(rounding):
    kind = {"inputs": QuantAdd, "sum": QuantAddOnce}[rounding]
    x = torch.arange(100.0)
    assert torch.equal(kind([grid(1.0), grid(1.0)], grid(1.0), None, 32)(x, x), 2 * x)
