"""What is measured by running only what is behind a change is what running everything gives."""

import pytest
import torch

from qtool.numerics.metrics import sqnr_db
from qtool.quantizers.prepare import build
from qtool.search.sensitivity import exact
from qtool.search.sensitivity.exact import harm_alone, harm_without
from qtool.search.sensitivity.scores import LogitSums


def brute_force(plans, plan, batches):
    """The score of a planned network, and the SQNR of its logits, batch by batch as the others run."""
    network, reference = build(plans.folded, plan), plans.float_network()
    sums, logits = LogitSums(), ([], [])
    with torch.no_grad():
        for images, labels in batches:
            pair = reference(images), network(images)
            sums.add(*pair, labels)
            logits[0].append(pair[0])
            logits[1].append(pair[1])
    return sums.score(), sqnr_db(torch.cat(logits[0]), torch.cat(logits[1]))


@pytest.mark.parametrize("bits", [8, 3])
def test_the_harm_of_a_group_alone_is_that_of_the_network_in_which_only_it_is_quantized(
    make_plans, batches, bits
):
    plans = make_plans(bits_weights=bits, bits_activations=bits)
    points = [plans.alone(group) for group in plans.groups]
    for point, found in zip(points, harm_alone(plans, points, batches), strict=True):
        expected, db = brute_force(plans, point.plan, batches)
        assert found.noise == pytest.approx(expected.noise, rel=1e-3), point.group
        assert found.sqnr_db == pytest.approx(db, abs=0.01)
        assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-9)
        assert found.loss == pytest.approx(expected.loss, rel=1e-2, abs=1e-6)
        assert found.top1 == expected.top1


@pytest.mark.parametrize("together", [1, 64])
def test_the_gain_of_a_group_is_that_of_the_network_in_which_only_it_is_in_float(
    make_plans, batches, monkeypatch, together
):
    monkeypatch.setattr(exact, "TOGETHER", together)  # 1: a batch at a time
    plans = make_plans(bits_weights=3, bits_activations=3)
    whole, scores = harm_without(plans, plans.groups, batches)
    assert whole == brute_force(plans, plans.whole, batches)[0]
    for group, found in zip(plans.groups, scores, strict=True):
        assert found == brute_force(plans, plans.without(group).plan, batches)[0], group


def test_only_what_is_behind_a_change_runs(make_plans, batches, monkeypatch):
    plans = make_plans()
    ran = []
    stem = plans.folded.traced.get_submodule("stem")
    handle = stem.register_forward_hook(lambda *_: ran.append("stem"))
    try:
        harm_alone(plans, [plans.alone(group) for group in plans.groups[1:]], batches)
    finally:
        handle.remove()
    assert len(ran) == 2 * len(batches)  # the float logits, and the walk


def test_a_network_without_change_has_no_harm(make_plans, batches):
    plans = make_plans(bits_weights=16, bits_activations=0)
    scores = harm_alone(plans, [plans.alone(group) for group in plans.groups], batches)
    assert all(score.top1 == 0 and score.sqnr_db > 80 for score in scores)
