"""The greedy search for clip modes."""

import pytest
import torch

from qtool.config import QuantizeConfig
from qtool.graph.fold import fold_batch_norms
from qtool.graph.trace import trace
from qtool.pipeline.search_clipping import specs_by_mode
from qtool.search.clipping import MODES, candidates, layers_to_decide, search_clipping
from qtool.search.trials import Score


@pytest.fixture
def folded(tiny_net):
    return fold_batch_norms(trace(tiny_net, torch.randn(2, 3, 8, 8))).traced


def decide(folded, specs, prefer):
    """Search with a score that prefers one mode of each layer; the trials, and the modes found."""
    trials = []

    def score(name, trial):
        layer, mode = name.split()
        trials.append((name, set(trial)))
        return Score(loss=0.0 if prefer.get(layer, "none") == mode else 1.0, top1=50.0)

    return trials, {c.layer: c.mode for c in search_clipping(folded, specs, score)}


def test_the_best_mode_of_each_layer_is_kept(folded):
    specs = specs_by_mode(QuantizeConfig(bits_activations=4), folded)
    prefer = {"conv1": "gauss", "fc": "avg"}
    _, found = decide(folded, specs, prefer)
    assert {n: m for n, m in found.items() if m != "none"} == prefer


def test_layers_not_decided_yet_stay_in_float(folded):
    specs = specs_by_mode(QuantizeConfig(bits_activations=4), folded)
    order = layers_to_decide(folded, specs["none"])
    trials, _ = decide(folded, specs, {})
    assert order[0] == "conv1" and "relu1" not in order  # conv1 computes it
    for name, given in trials:
        layer = name.split()[0]
        assert given.isdisjoint(order[order.index(layer) + 1 :])
        assert given >= set(order[: order.index(layer) + 1])


def test_top1_counts_before_loss(folded):
    specs = specs_by_mode(QuantizeConfig(bits_activations=4), folded)
    scores = {
        "none": Score(0.1, 90.0),
        "avg": Score(0.5, 91.0),
        "gauss": Score(0.4, 91.0),
        "laplace": Score(0.4, 91.0),
    }
    found = list(search_clipping(folded, specs, lambda name, _: scores[name.split()[1]]))
    assert {c.mode for c in found} == {"gauss"}
    assert found[0].score == scores["gauss"] and tuple(found[0].scores) == MODES


def test_wide_grids_and_excluded_layers_have_fewer_modes(folded):
    config = QuantizeConfig(
        bits_activations=4, overrides={"fc": {"bits_activations": 12}}, no_clip_layers=("conv1",)
    )
    specs = specs_by_mode(config, folded)
    assert candidates("fc", specs) == ["none", "avg"]
    assert candidates("conv1", specs) == ["none"]
    assert candidates("depthwise", specs) == list(MODES)
