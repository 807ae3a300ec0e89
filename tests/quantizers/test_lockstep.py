"""The float and the quantized network walked side by side."""

from dataclasses import replace

import pytest
import torch

from qtool.config import QuantizeConfig
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.pipeline import steps
from qtool.quantizers.lockstep import Lockstep, float_bias
from qtool.quantizers.plan import plan_model
from qtool.quantizers.prepare import build


def _lockstep(net, batches, **settings):
    traced = trace(net, batches[0])
    folded = fold_batch_norms(traced)
    stats = move_stats(steps.calibrate(traced, batches), folded.pairs)
    specs = steps.specs_for(traced, QuantizeConfig(mode="asym_u", **settings))
    return Lockstep(folded.traced, folded, plan_model(folded.traced, stats, specs), batches)


def test_every_layer_with_integers_has_its_moment(tiny_net, tiny_batches):
    lockstep = _lockstep(tiny_net, tiny_batches)
    assert [moment.name for moment in lockstep.moments()] == ["conv1", "depthwise", "fc"]


def test_inputs_of_both_networks_are_close_and_not_equal(tiny_net, tiny_batches):
    for moment in _lockstep(tiny_net, tiny_batches).moments():
        x, x_hat = torch.cat(moment.float_inputs), torch.cat(moment.quant_inputs)
        assert 0 < float((x - x_hat).norm() / x.norm()) < 0.05


def test_weights_only_layers_read_floats(tiny_net, tiny_batches):
    lockstep = _lockstep(tiny_net, tiny_batches, bits_activations=0)
    found = [torch.equal(*map(torch.cat, (m.float_inputs, m.quant_inputs))) for m in lockstep.moments()]
    assert found == [True, False, False]


def test_changes_are_seen_by_later_layers_and_are_in_the_plan(tiny_net, tiny_batches):
    plain = {m.name: m.quant_inputs[0] for m in _lockstep(tiny_net, tiny_batches).moments()}
    lockstep = _lockstep(tiny_net, tiny_batches)
    given = lockstep.plan
    for moment in lockstep.moments():
        if moment.name == "conv1":
            bias = float_bias(lockstep.folded.traced.get_submodule("conv1"), 8) + 0.5
            lockstep.change("conv1", weight_q=moment.plan.weight_q.clone().fill_(1), bias=bias)
        else:
            assert not torch.equal(moment.quant_inputs[0], plain[moment.name])
    assert given.layers["conv1"].weight_q.unique().numel() > 1
    rebuilt = build(lockstep.folded, lockstep.plan)
    with torch.no_grad():
        assert torch.equal(rebuilt.network(tiny_batches[0]), lockstep.network(tiny_batches[0]))


def test_another_grid_of_a_weight_takes_the_accumulator_along(tiny_net, tiny_batches):
    lockstep = _lockstep(tiny_net, tiny_batches)
    before = lockstep.plan.layers["fc"]
    lockstep.change("fc", weight=replace(before.weight, scale=2 * before.weight.scale))
    after = lockstep.plan.layers["fc"]
    assert torch.equal(after.weight_q, before.weight_q)
    assert torch.allclose(after.accum_scale, 2 * before.accum_scale)
    assert torch.allclose(after.bias_q * after.accum_scale, before.bias_q * before.accum_scale, atol=1e-4)


def test_the_quantized_network_need_not_run(tiny_net, tiny_batches):
    lockstep = _lockstep(tiny_net, tiny_batches)
    for moment in lockstep.moments(quantized=False):
        assert torch.isfinite(moment.float_inputs[0]).all()
        lockstep.change(moment.name, bias=float_bias(moment.module, len(moment.module.weight)) + 1)
    walked = _lockstep(tiny_net, tiny_batches)
    wanted = {m.name: m.float_inputs[0] for m in walked.moments()}
    found = {m.name: m.float_inputs[0] for m in _lockstep(tiny_net, tiny_batches).moments(quantized=False)}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("bits", [0, 8])
def test_the_other_operand_of_a_sum_is_there_before_the_sum(bits, tiny_net, tiny_batches):
    lockstep = _lockstep(tiny_net, tiny_batches, bits_activations=bits)
    for moment in lockstep.moments():
        if moment.name == "depthwise":
            found = torch.cat(list(lockstep.quant_operand("add", 0)))
            assert torch.equal(found, torch.cat(moment.quant_inputs))
            y_hat = torch.cat(list(lockstep.quant_operand("add", 1)))
    with torch.no_grad():
        x = tiny_net.relu1(tiny_net.bn1(tiny_net.conv1(torch.cat(tiny_batches))))
        y = tiny_net.relu2(tiny_net.bn2(tiny_net.depthwise(x)))
    assert float((y - y_hat).norm() / y.norm()) < 0.05
