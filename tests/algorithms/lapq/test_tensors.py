"""Ranges as a vector of octaves, and where they start."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.algorithms.lapq import LapqSpec, searched_tensors, split, with_ranges
from qtool.config import QuantizeConfig
from qtool.errors import ConfigError
from qtool.numerics.spec import LayerSpec, QuantSpec
from qtool.pipeline.steps import specs_for


def test_an_octave_doubles_a_range(tensor):
    both = tensor(QuantSpec())
    ends = tensor(QuantSpec(symmetric=False), numbers=2)
    assert both.asked_at(np.array([1.0])) == {"output_range": (-2.0, 6.0)}
    assert ends.asked_at(np.array([-1.0, 0.0])) == {"output_range": (-0.5, 3.0)}


@given(octave=st.floats(allow_nan=False))
def test_ranges_stay_finite_and_keep_their_signs(tensor, octave):
    low, high = tensor(QuantSpec()).asked_at(np.array([octave]))["output_range"]
    assert -1e6 < low < 0 < high < 1e6


def test_a_vector_is_split_by_tensor(tensor):
    tensors = [tensor(QuantSpec()), tensor(QuantSpec(symmetric=False), numbers=2), tensor(QuantSpec())]
    parts = split(np.arange(4.0), tensors)
    assert [p.tolist() for p in parts] == [[0.0], [1.0, 2.0], [3.0]]


def test_other_fields_of_a_spec_stay(tensor):
    spec = LayerSpec(output=QuantSpec(num_bits=4), accum_bits=24)
    (found,) = with_ranges({"conv1": spec}, [tensor(QuantSpec())], np.zeros(1)).values()
    assert found == LayerSpec(output=QuantSpec(num_bits=4), accum_bits=24, output_range=(-1.0, 3.0))


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("both_ends", [False, True])
def test_the_start_without_clipping_changes_nothing(trials, mode, per_channel, both_ends, problem):
    settings = LapqSpec(init_mode="none", both_ends=both_ends)
    tensors, specs = problem(settings, mode=mode, per_channel_weights=per_channel)
    start = with_ranges(specs, tensors, np.zeros(sum(t.numbers for t in tensors)))
    x = trials.batches[0][0]
    assert torch.equal(trials.quantize(start)(x), trials.quantize(specs)(x))


@pytest.mark.parametrize("mode", ["avg", "gauss", "laplace"])
def test_a_clipped_start_is_that_of_the_clip_mode(trials, mode, problem):
    tensors, specs = problem(LapqSpec(init_mode=mode))
    start = with_ranges(specs, tensors, np.zeros(len(tensors)))
    config = QuantizeConfig(bits_activations=4, bits_weights=4, clip_activations=mode, also_clip_weights=True)
    clipped = trials.quantize(specs_for(trials.folded.traced, config)).plan.layers
    for name, layer in trials.quantize(start).plan.layers.items():
        if layer.output is not None:
            assert torch.allclose(layer.output.scale, clipped[name].output.scale), name
        if layer.weight is not None:
            assert torch.allclose(layer.weight.scale, clipped[name].weight.scale), name


def test_only_asymmetric_ranges_around_zero_have_two_numbers(problem):
    tensors, _ = problem(LapqSpec(both_ends=True), mode="asym_u")
    numbers = {(t.layer, t.part): t.numbers for t in tensors}
    assert numbers["conv1", "weight"] == 2
    assert numbers["conv1", "output"] == 1  # behind a ReLU
    assert numbers["fc", "output"] == 2
    symmetric, _ = problem(LapqSpec(both_ends=True), mode="sym")
    assert {t.numbers for t in symmetric} == {1}


def test_nothing_to_search_is_refused(trials):
    specs = specs_for(trials.folded.traced, QuantizeConfig(bits_activations=0, bits_weights=0))
    with pytest.raises(ConfigError, match="no layer is quantized"):
        searched_tensors(trials.folded.traced, trials.stats, specs, {}, LapqSpec())


def test_octaves_are_rounded_to_steps(tensor):
    near = [tensor(QuantSpec()).asked_at(np.array([octave])) for octave in (0.5, 0.502, 0.52)]
    assert near[0] == near[1] != near[2]


def test_a_fit_is_close_to_the_best_of_all_widths(tensor):
    values = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 999)).clamp(-1, 1)
    searched = tensor(QuantSpec(num_bits=3), values=values)
    (octave,) = searched.fit(2.0, "Powell")
    errors = [searched.error_at(np.array([o]), 2.0) for o in np.arange(-4, 2, 1 / 64)]
    assert searched.error_at(np.array([octave]), 2.0) < 1.05 * min(errors)


@pytest.mark.parametrize("mode", ["asym_s", "asym_u"])
def test_d6_the_range_that_is_read_back_is_the_range(trials, problem, mode):
    """Distiller read (-2.53, 2.51) back as (0, 5.05) on a signed grid, and searched from there."""
    tensors, _ = problem(LapqSpec(init_mode="none", both_ends=True), mode=mode)
    (fc,) = (t for t in tensors if (t.layer, t.part) == ("fc", "output"))
    record = trials.stats.output("fc")
    assert record.min < 0 < record.max
    assert fc.asked_at(np.zeros(2)) == {"output_range": pytest.approx((record.min, record.max))}
