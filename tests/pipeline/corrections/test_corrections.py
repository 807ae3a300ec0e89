"""Corrections in order, their settings, their record, and going on after an end."""

from contextlib import contextmanager

import pytest
import torch

from qtool.algorithms.store import MemoryStore
from qtool.config import CorrectionsConfig, QuantizeConfig
from qtool.errors import ConfigError
from qtool.graph.trace import trace
from qtool.numerics.metrics import sqnr_db
from qtool.pipeline import steps
from qtool.pipeline.corrections import decide, quantize_corrected
from qtool.pipeline.corrections.methods import METHODS
from qtool.pipeline.layer_files import LayerFiles

FOUR_BITS = QuantizeConfig(mode="asym_u", bits_weights=4)


@pytest.fixture
def traced(tiny_net, tiny_batches):
    return trace(tiny_net, tiny_batches[0])


def _run(traced, batches, *methods, quantizers=FOUR_BITS, **more):
    corrections = decide(traced, quantizers, CorrectionsConfig(methods=methods))
    return quantize_corrected(
        traced, corrections, batches, lambda network: steps.calibrate(network, batches), **more
    )


def _sqnr(traced, batches, model):
    x = torch.cat(batches)
    with torch.no_grad():
        return sqnr_db(traced(x), model(x))


def test_without_methods_it_is_plain_quantization(traced, tiny_batches):
    found = _run(traced, tiny_batches).model
    plain = steps.quantize(traced, steps.calibrate(traced, tiny_batches), FOUR_BITS)
    assert torch.equal(found(tiny_batches[0]), plain(tiny_batches[0]))


@pytest.mark.parametrize("method", ["bias_correction", "gptq", "adaround", "reconstruction"])
def test_a_method_keeps_more_of_the_logits(traced, tiny_batches, method):
    plain, found = _run(traced, tiny_batches), _run(traced, tiny_batches, method)
    before, after = (_sqnr(traced, tiny_batches, done.model) for done in (plain, found))
    assert after > before
    (record,) = found.record["methods"]
    assert record["method"] == method
    assert {c["layer"] for c in record["changed"]} <= {"conv1", "depthwise", "fc"}


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_and_says_what_it_did(traced, tiny_batches, method):
    found = _run(traced, tiny_batches, method)
    (record,) = found.record["methods"]
    assert record["seconds"] >= 0
    assert record["changed"] or record["left"]
    assert found.record["images"] == 12


def test_a_changed_float_network_is_measured_again(linked_net, tiny_batches):
    traced = trace(linked_net, tiny_batches[0])
    measured = []

    def measure(network):
        measured.append(network)
        return steps.calibrate(network, tiny_batches)

    def run(method):
        measured.clear()
        corrections = decide(traced, FOUR_BITS, CorrectionsConfig(methods=(method,)))
        return quantize_corrected(traced, corrections, tiny_batches, measure)

    by_weights = run("{equalization: {by: weights}}")
    assert by_weights.record["methods"][0]["changed"]
    assert len(measured) == 1 and measured[0] is not traced
    run("{equalization: {by: activations}}")
    assert len(measured) == 2 and measured[0] is traced
    run("bias_correction")
    assert measured == [traced]


def test_excluded_layers_stay(traced, tiny_batches):
    found = _run(traced, tiny_batches, "{gptq: {exclude: ['conv.*', fc]}}")
    assert [c["layer"] for c in found.record["methods"][0]["changed"]] == ["depthwise"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("{gptq: {swepes: 3}}", "gptq: unknown setting 'swepes'; did you mean 'sweeps'"),
        ("{gptq: {sweeps: many}}", "gptq.sweeps: found 'many'; a whole number is wanted"),
        ("{gptq: {damping: -1}}", "damping must be above 0"),
        ("{smooth_quant: {alphas: 3}}", "alphas: found 3; a mapping is wanted"),
        ("bias_correction, equalization", "equalization changes the float network, and stands behind"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(traced, method, words):
    with pytest.raises(ConfigError, match="corrections: ") as error:
        decide(traced, FOUR_BITS, CorrectionsConfig(methods=(method,)))
    assert words in str(error.value)


def test_a_pattern_without_a_layer_is_refused(traced, tiny_batches):
    with pytest.raises(ConfigError, match="matches no layer"):
        _run(traced, tiny_batches, "{gptq: {exclude: nowhere}}")


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["gptq", "adaround", "reconstruction"])
def test_a_run_that_was_stopped_ends_as_one_that_ran_through(traced, tiny_batches, tmp_path, method):
    whole = _run(traced, tiny_batches, method, store_for=lambda *_: MemoryStore())
    stored = LayerFiles(tmp_path, "inputs")

    @contextmanager
    def stop_at_the_last(_name):
        def show(progress):
            if progress.number == progress.of:
                raise _Stopped

        yield show

    with pytest.raises(_Stopped):
        _run(traced, tiny_batches, method, show=stop_at_the_last, store_for=lambda *_: stored)
    assert list(tmp_path.iterdir())
    resumed = _run(traced, tiny_batches, method, store_for=lambda *_: stored)
    for name, layer in whole.model.plan.layers.items():
        other = resumed.model.plan.layers[name]
        for field in ("weight_q", "bias_q"):
            a, b = getattr(layer, field), getattr(other, field)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert torch.equal(whole.model(tiny_batches[0]), resumed.model(tiny_batches[0]))
