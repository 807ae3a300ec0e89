"""Estimates of the harm of single groups, against what running the networks gives."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.trace import trace
from qtool.pipeline.steps import specs_for
from qtool.search.sensitivity.estimate import estimate
from qtool.search.sensitivity.exact import harm_alone
from qtool.search.sensitivity.points import Plans


def db(values: list[float]) -> np.ndarray:
    return 10 * np.log10(np.array(values))


@pytest.mark.parametrize("metric", ["sqnr", "kl"])
@pytest.mark.parametrize(("bits", "within"), [(8, 0.7), (5, 1.0)])
def test_estimates_agree_with_what_is_measured(make_plans, batches, metric, bits, within):
    plans = make_plans(bits_weights=bits, bits_activations=bits)
    points = [plans.alone(group) for group in plans.groups]
    images = [x for x, _ in batches]
    exact = [s.harm(metric) for s in harm_alone(plans, points, batches)]
    found = [s.harm(metric) for s in estimate(plans, points, images, metric, probes=32)]
    # 48 images and 32 vectors: the standard error is about 0.16 dB; the rest is the first order's.
    assert np.abs(db(found) - db(exact)).max() < within
    assert spearmanr(found, exact).statistic > 0.9


def test_in_a_linear_network_only_chance_is_between_estimate_and_measurement():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 12)).eval()
    images = [torch.randn(64, 16)]
    traced = trace(net, images[0][:2])
    specs = specs_for(traced, QuantizeConfig(bits_weights=4, bits_activations=4))
    plans = Plans(traced, qtool.calibrate(net, images), specs)
    points = [plans.alone(group) for group in plans.groups]
    exact = [s.noise for s in harm_alone(plans, points, [(images[0], torch.zeros(64).long())])]
    found = [s.noise for s in estimate(plans, points, images, probes=500)]
    assert found == pytest.approx(exact, rel=0.03)


def test_more_vectors_bring_estimates_closer(make_plans, batches):
    plans = make_plans(bits_weights=8, bits_activations=8)
    points = [plans.alone(group) for group in plans.groups]
    images = [x[:4] for x, _ in batches[:1]]
    exact = db([s.noise for s in harm_alone(plans, points, [(images[0], batches[0][1][:4])])])

    def spread(probes: int) -> float:
        runs = [estimate(plans, points, images, seed=seed, probes=probes) for seed in range(8)]
        return float(np.mean([np.abs(db([s.noise for s in run]) - exact).mean() for run in runs]))

    assert spread(32) < 0.5 * spread(1)


def test_the_same_seed_gives_the_same_estimates(make_plans, batches):
    plans = make_plans()
    points = [plans.alone(group) for group in plans.groups]
    images = [x for x, _ in batches]
    assert estimate(plans, points, images, seed=5) == estimate(plans, points, images, seed=5)
    assert estimate(plans, points, images, seed=5) != estimate(plans, points, images, seed=6)


def test_a_group_of_several_layers_is_one_error(make_plans, batches):
    plans = make_plans(bits_weights=6, bits_activations=6)
    (group,) = (g for g in plans.groups if {"relu1", "stem", "second"} <= set(g.layers))
    point = plans.alone(group)
    (exact,) = harm_alone(plans, [point], batches)
    (found,) = estimate(plans, [point], [x for x, _ in batches], probes=32)
    assert found.sqnr_db == pytest.approx(exact.sqnr_db, abs=0.7)


def test_images_that_cannot_be_told_apart_are_estimated_together(net, stats, batches):
    eight = [(x[:8], y[:8]) for x, y in batches]
    traced = trace(net, eight[0][0])  # as many as are run together, so that no axis has grown
    plans = Plans(traced, stats, specs_for(traced, QuantizeConfig()))
    points = [plans.alone(group) for group in plans.groups]
    exact = [s.noise for s in harm_alone(plans, points, eight)]
    found = [s.noise for s in estimate(plans, points, [x for x, _ in eight], probes=400)]
    assert db(found) == pytest.approx(db(exact), abs=1.0)
