"""The score of a trial, however it was arrived at."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import qtool
from qtool.config import QuantizeConfig
from qtool.graph.trace import trace
from qtool.numerics.spec import ClipSpec
from qtool.pipeline.steps import specs_for
from qtool.search.trials import Score, Trials, only_ranges_differ

LABELS = [torch.tensor([0, 1, 2, 3])] * 3


@pytest.fixture
def trials(tiny_net, tiny_batches) -> Trials:
    stats = qtool.calibrate(tiny_net, tiny_batches)
    traced = trace(tiny_net, tiny_batches[0])
    return Trials(traced, stats, list(zip(tiny_batches, LABELS, strict=True)))


@pytest.fixture
def specs(trials):
    config = QuantizeConfig(bits_weights=4, bits_activations=4, mode="asym_u")
    return specs_for(trials.folded.traced, config)


@torch.no_grad()
def score_of(model, trials: Trials) -> Score:
    """Batch by batch, as trials do."""
    loss = sum(float(F.cross_entropy(model(x).double(), y, reduction="sum")) for x, y in trials.batches)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in trials.batches)
    return Score(loss / trials.images, 100 * right / trials.images)


def test_a_score_is_that_of_the_quantized_network(tiny_net, tiny_batches, trials):
    config = QuantizeConfig(bits_weights=4)
    found = trials.score(specs_for(trials.folded.traced, config))
    model = qtool.quantize(tiny_net, qtool.calibrate(tiny_net, tiny_batches), config)
    logits = model(torch.cat(tiny_batches)).double()
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, torch.cat(LABELS))), rel=1e-12)
    assert found.top1 == 100 * float((logits.argmax(1) == torch.cat(LABELS)).double().mean())


CHANGES = {
    "output_range": st.none() | st.tuples(st.floats(-2, -0.1), st.floats(0.1, 4)),
    "weight_range": st.none() | st.tuples(st.floats(-2, -0.1), st.floats(0.1, 2)),
    "weight_range_factors": st.none() | st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    "weight_clip": st.sampled_from([None, ClipSpec("gauss")]),
    "clip": st.sampled_from([ClipSpec(), ClipSpec("avg")]),
}


# The fixtures are not changed: the walk has trials of its own.
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("max_bytes", [0, 3000, 1 << 30])
def test_the_scores_of_a_walk_are_those_of_networks_built_from_scratch(trials, specs, max_bytes, data):
    walk = Trials(trials.folded.traced, trials.stats, trials.batches, max_bytes=max_bytes)
    at = dict(specs)
    for _ in range(data.draw(st.integers(1, 5))):
        name, field = data.draw(st.sampled_from(sorted(specs))), data.draw(st.sampled_from(sorted(CHANGES)))
        at[name] = replace(at[name], **{field: data.draw(CHANGES[field])})
        assert walk.score(at) == score_of(trials.quantize(at), trials)


def test_ranges_change_the_network_in_place_and_other_settings_do_not(trials, specs):
    moved = {**specs, "conv1": replace(specs["conv1"], output_range=(0.0, 1.0))}
    clipped = {**specs, "conv1": replace(specs["conv1"], clip=ClipSpec("avg"))}
    assert only_ranges_differ(specs, moved) and only_ranges_differ(moved, specs)
    assert not only_ranges_differ(specs, clipped)
    assert not only_ranges_differ(specs, {name: specs[name] for name in list(specs)[1:]})


def test_a_trial_that_failed_leaves_nothing_wrong(trials, specs):
    trials.score(specs)
    wrong = {**specs, "fc": replace(specs["fc"], output_range=(0.0, float("nan")))}
    with pytest.raises(qtool.errors.QtoolError):
        trials.score(wrong)
    assert trials.score(specs) == score_of(trials.quantize(specs), trials)


def test_later_layers_take_less_time(trials, specs):
    assert trials.seconds("conv1") is None
    trials.score(specs)
    assert trials.seconds("conv1") > trials.seconds("fc") > 0
