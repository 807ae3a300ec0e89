"""A quantized network with its activations back in float."""

import torch
from torch import nn

import qtool
from qtool.graph.fold import fold_batch_norms, move_stats
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.quantizers.plan import plan_model
from qtool.quantizers.plan.weights_only import weights_only
from qtool.quantizers.prepare import build


def _planned(net, batches, **settings):
    traced = trace(net, batches[0])
    folded = fold_batch_norms(traced)
    specs = specs_for(traced, qtool.QuantizeConfig(mode="asym_u", **settings))
    stats = move_stats(qtool.calibrate(traced, batches), folded.pairs)
    return folded, plan_model(folded.traced, stats, specs)


def test_it_computes_what_a_network_computes_whose_weights_alone_were_quantized(tiny_net, tiny_batches):
    folded, plan = _planned(tiny_net, tiny_batches, bits_weights=4, bits_activations=3)
    _, expected = _planned(tiny_net, tiny_batches, bits_weights=4, bits_activations=0)
    x = torch.cat(tiny_batches)
    found = build(folded, weights_only(folded.traced, plan))(x)
    wanted = build(folded, expected)(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02  # biases were rounded to accumulators' steps
    assert float((build(folded, plan)(x) - wanted).norm() / wanted.norm()) > 0.1


def test_integers_and_grids_of_weights_stay_and_activations_are_computed_again(tiny_net, tiny_batches):
    folded, plan = _planned(tiny_net, tiny_batches)
    found = weights_only(folded.traced, plan).layers
    kinds = {name: layer.kind for name, layer in found.items()}
    assert [n for n, kind in kinds.items() if kind == "weights only"] == ["conv1", "depthwise", "fc"]
    assert {kinds[n] for n in ("relu1", "relu2", "add", "pool")} == {"float"}
    for name in ("conv1", "depthwise", "fc"):
        assert found[name].weight_q is plan.layers[name].weight_q
        assert found[name].weight is plan.layers[name].weight


def test_a_layer_that_was_to_be_left_out_stays_so(tiny_batches):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1)).eval()
    folded, plan = _planned(net, tiny_batches, overrides={"1": {"make_identity": True}})
    found = weights_only(folded.traced, plan)
    assert found.layers["1"].kind == "identity"
    x = tiny_batches[0]
    wanted = net[2](net[0](x))
    assert float((build(folded, found)(x) - wanted).norm() / wanted.norm()) < 0.02
