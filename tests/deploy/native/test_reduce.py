import pytest
import torch

import qtool
from qtool.deploy.native import INT8, Target, convert
from qtool.deploy.native.reduce import reduce_ranges
from qtool.pipeline.steps import specs_for
from qtool.quantizers.prepare import quantize_graph


@pytest.mark.parametrize("mode", ["asym_u", "sym"])
def test_seven_bits_where_sums_could_saturate_and_nowhere_else(mode, kernel_net, kernel_stats, kernel_batch):
    config = qtool.QuantizeConfig(mode=mode, mode_weights="sym", per_channel_weights=True)
    traced = qtool.trace(kernel_net, kernel_batch)
    specs = specs_for(traced, config)
    model = quantize_graph(traced, kernel_stats, specs)
    risky = {name for name, layer in convert(model).layers.items() if layer.saturating}
    assert risky
    reduced, words = reduce_ranges(model, specs)
    again = quantize_graph(traced, kernel_stats, reduced)
    native = convert(again, Target("x86", vnni=False))
    assert not any(layer.saturating for layer in native.layers.values())
    assert all(native.layers[name].runs == INT8 for name in risky)
    changed = {n for n in reduced if reduced[n] != specs[n]}
    assert {word.split()[-1] for word in words} == changed
    assert len(words) <= len(risky)
    assert {reduced[n].output.num_bits for n in set(specs) - changed} == {8}
    assert torch.equal(again(kernel_batch).argmax(1), native(kernel_batch).argmax(1))


def test_a_network_that_cannot_saturate_stays_as_it_is(kernel_net, kernel_stats, kernel_batch):
    config = qtool.QuantizeConfig(mode="asym_u", bits_activations=6)
    traced = qtool.trace(kernel_net, kernel_batch)
    specs = specs_for(traced, config)
    reduced, words = reduce_ranges(quantize_graph(traced, kernel_stats, specs), specs)
    assert words == [] and reduced == specs
