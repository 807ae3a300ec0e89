"""LAPQ: ranges as a vector, the error in the p-norm, the choice of p, and the search."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qtool
from qtool.algorithms.lapq import (
    P_VALUES,
    LapqSpec,
    SearchedTensor,
    lapq,
    lp_error,
    parabola_minimum,
    sample_outputs,
    searched_tensors,
    split,
    with_ranges,
)
from qtool.config import QuantizeConfig
from qtool.errors import ConfigError
from qtool.graph.trace import trace
from qtool.numerics.spec import LayerSpec, QuantSpec
from qtool.pipeline.steps import specs_for
from qtool.search.trials import Trials


def tensor(grid: QuantSpec, numbers: int = 1, values: torch.Tensor | None = None) -> SearchedTensor:
    values = torch.linspace(-1, 3, 101) if values is None else values
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    return SearchedTensor("conv1", "output", grid, low, high, (1.0, 1.0), numbers, values)


@pytest.fixture
def trials(tiny_net, tiny_batches) -> Trials:
    """tiny_net on its batches; the labels are its own predictions."""
    labels = [tiny_net(x).argmax(1) for x in tiny_batches]
    traced = trace(tiny_net, tiny_batches[0])
    return Trials(
        traced, qtool.calibrate(tiny_net, tiny_batches), list(zip(tiny_batches, labels, strict=True))
    )


def problem(trials: Trials, settings: LapqSpec, **options):
    specs = specs_for(trials.folded.traced, QuantizeConfig(bits_activations=4, bits_weights=4, **options))
    outputs = sample_outputs(trials.folded.traced, [x for x, _ in trials.batches])
    return searched_tensors(trials.folded.traced, trials.stats, specs, outputs, settings), specs


def test_an_octave_doubles_a_range():
    both = tensor(QuantSpec())
    ends = tensor(QuantSpec(symmetric=False), numbers=2)
    assert both.asked_at(np.array([1.0])) == {"output_range": (-2.0, 6.0)}
    assert ends.asked_at(np.array([-1.0, 0.0])) == {"output_range": (-0.5, 3.0)}


@given(st.floats(allow_nan=False))
def test_ranges_stay_finite_and_keep_their_signs(octave):
    low, high = tensor(QuantSpec()).asked_at(np.array([octave]))["output_range"]
    assert -1e6 < low < 0 < high < 1e6


def test_a_vector_is_split_by_tensor():
    tensors = [tensor(QuantSpec()), tensor(QuantSpec(symmetric=False), numbers=2), tensor(QuantSpec())]
    parts = split(np.arange(4.0), tensors)
    assert [p.tolist() for p in parts] == [[0.0], [1.0, 2.0], [3.0]]


def test_other_fields_of_a_spec_stay():
    spec = LayerSpec(output=QuantSpec(num_bits=4), accum_bits=24)
    (found,) = with_ranges({"conv1": spec}, [tensor(QuantSpec())], np.zeros(1)).values()
    assert found == LayerSpec(output=QuantSpec(num_bits=4), accum_bits=24, output_range=(-1.0, 3.0))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_lp_error_is_that_of_numpy(p):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    scale = 2 * 1.5 / 15
    x_hat = np.clip(np.round(x.numpy() / scale), -8, 7) * scale
    expected = np.mean(np.abs(x.numpy() - x_hat) ** p)
    found = lp_error(x, torch.tensor(-1.5), torch.tensor(1.5), QuantSpec(num_bits=4), p)
    assert found == pytest.approx(expected, rel=1e-4)  # float32 against float64


def test_a_larger_p_clips_less():
    x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.linspace(0.001, 0.999, 999))
    limit = x.max()
    widths = torch.linspace(0.2, 1.2, 101) * limit
    best = [float(min(widths, key=lambda w: lp_error(x, -w, w, QuantSpec(num_bits=3), p))) for p in (1, 2, 4)]
    assert best[0] < best[1] < best[2] < limit


def test_the_parabola_is_that_of_its_points():
    x = np.array(P_VALUES)
    assert parabola_minimum(x, 0.3 * (x - 2.7) ** 2 + 1) == pytest.approx(2.7)
    assert parabola_minimum(x, -(x**2)) is None
    assert parabola_minimum(x, (x - 5) ** 2) is None


@pytest.mark.parametrize("mode", ["sym", "sym_restr", "asym_s", "asym_u"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("both_ends", [False, True])
def test_the_start_without_clipping_changes_nothing(trials, mode, per_channel, both_ends):
    settings = LapqSpec(init_mode="none", both_ends=both_ends)
    tensors, specs = problem(trials, settings, mode=mode, per_channel_weights=per_channel)
    start = with_ranges(specs, tensors, np.zeros(sum(t.numbers for t in tensors)))
    x = trials.batches[0][0]
    assert torch.equal(trials.quantize(start)(x), trials.quantize(specs)(x))


@pytest.mark.parametrize("mode", ["avg", "gauss", "laplace"])
def test_a_clipped_start_is_that_of_the_clip_mode(trials, mode):
    tensors, specs = problem(trials, LapqSpec(init_mode=mode))
    start = with_ranges(specs, tensors, np.zeros(len(tensors)))
    config = QuantizeConfig(bits_activations=4, bits_weights=4, clip_activations=mode, also_clip_weights=True)
    clipped = trials.quantize(specs_for(trials.folded.traced, config)).plan.layers
    for name, layer in trials.quantize(start).plan.layers.items():
        if layer.output is not None:
            assert torch.allclose(layer.output.scale, clipped[name].output.scale), name
        if layer.weight is not None:
            assert torch.allclose(layer.weight.scale, clipped[name].weight.scale), name


def test_only_asymmetric_ranges_around_zero_have_two_numbers(trials):
    tensors, _ = problem(trials, LapqSpec(both_ends=True), mode="asym_u")
    numbers = {(t.layer, t.part): t.numbers for t in tensors}
    assert numbers["conv1", "weight"] == 2
    assert numbers["conv1", "output"] == 1  # behind a ReLU
    assert numbers["fc", "output"] == 2
    symmetric, _ = problem(trials, LapqSpec(both_ends=True), mode="sym")
    assert {t.numbers for t in symmetric} == {1}


@pytest.mark.parametrize("options", [{}, {"per_channel_weights": True}, {"mode": "asym_u"}])
@pytest.mark.parametrize("init_mode", ["auto", "l2", "none"])
def test_the_end_is_not_worse_than_the_start(trials, init_mode, options):
    """D11: the network kept the ranges of the last trial, not those of the best."""
    settings = LapqSpec(init_mode=init_mode, maxfev=20)
    tensors, specs = problem(trials, settings, **options)
    result = lapq(tensors, specs, lambda s: trials.score(s).loss, settings)
    assert result.loss <= result.initial_loss
    assert result.loss == trials.score(result.specs).loss
    assert result.initial_loss == trials.score(result.initial).loss
    assert (result.p is None) == (init_mode == "none")


def test_auto_takes_the_best_p(trials):
    settings = LapqSpec(maxfev=1)
    tensors, specs = problem(trials, settings)
    result = lapq(tensors, specs, lambda s: trials.score(s).loss, settings)
    assert set(P_VALUES) <= set(result.losses_of_p)
    assert result.initial_loss == min(result.losses_of_p.values()) == result.losses_of_p[result.p]


@pytest.mark.parametrize("method", ["Powell", "Nelder-Mead"])
@pytest.mark.parametrize("basinhopping", [False, True])
def test_every_method_finds_a_better_range(method, basinhopping):
    grid = QuantSpec(num_bits=3)
    settings = LapqSpec("none", method=method, basinhopping=basinhopping, basinhopping_niter=2, maxiter=20)

    def loss(specs):
        low, high = (torch.tensor(v) for v in specs["conv1"].output_range)
        return lp_error(values, low, high, grid, 2)

    values = 0.4 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    result = lapq([tensor(grid, values=values)], {"conv1": LayerSpec(output=grid)}, loss, settings)
    assert result.loss < 0.2 * result.initial_loss


def test_a_remembered_search_computes_nothing(trials):
    settings = LapqSpec(maxfev=15)
    tensors, specs = problem(trials, settings)
    known: dict[str, list[float]] = {}

    def memo(name, compute):
        known.setdefault(name, None)
        known[name] = known[name] or list(compute())
        return known[name]

    first = lapq(tensors, specs, lambda s: trials.score(s).loss, settings, memo)
    again = lapq(tensors, specs, lambda _: pytest.fail("computed"), settings, memo)
    assert again == first


def test_nothing_to_search_is_refused(trials):
    specs = specs_for(trials.folded.traced, QuantizeConfig(bits_activations=0, bits_weights=0))
    with pytest.raises(ConfigError, match="no layer is quantized"):
        searched_tensors(trials.folded.traced, trials.stats, specs, {}, LapqSpec())


@pytest.mark.parametrize("mode", ["asym_s", "asym_u"])
def test_d6_the_range_that_is_read_back_is_the_range(trials, mode):
    """Distiller read (-2.53, 2.51) back as (0, 5.05) on a signed grid, and searched from there."""
    tensors, _ = problem(trials, LapqSpec(init_mode="none", both_ends=True), mode=mode)
    (fc,) = (t for t in tensors if (t.layer, t.part) == ("fc", "output"))
    record = trials.stats.output("fc")
    assert record.min < 0 < record.max
    assert fc.asked_at(np.zeros(2)) == {"output_range": pytest.approx((record.min, record.max))}
