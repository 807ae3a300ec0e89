"""Files of `qtool check`: what they give, and every problem with its line."""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.config.gate import Threshold, load_gate
from qtool.errors import ConfigError

GOOD = """\
baseline: base.json
error_rate: 0.01
runs:
  - name: w4
    config: w4.yaml
    quantizers: {bits_activations: 6}
    judge: point
    expect: {top1_min: 98, drop_max: baseline + 0.5, agreement_min: baseline, logit_sqnr_db_min: -3.5}
  - name: w8
    expect: {drop_max: -1e-1}
"""


def problems(path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_gate(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_run_is_a_file_and_what_stands_over_it(write_config):
    path = write_config(GOOD)
    (path.parent / "w4.yaml").write_text(
        "quantizers: {bits_weights: 4, bits_activations: 7}\nrun: {seed: 3}\n"
    )
    gate = load_gate(path)
    first, second = gate.runs
    assert (gate.baseline, gate.error_rate) == (path.parent / "base.json", 0.01)
    assert (first.config.quantizers.bits_weights, first.config.quantizers.bits_activations) == (4, 6)
    assert first.config.run.seed == 3
    assert (first.judge, second.judge) == ("point", "interval")
    assert first.expect.given() == {
        "top1_min": Threshold(98),
        "drop_max": Threshold(0.5, from_baseline=True),
        "agreement_min": Threshold(0, from_baseline=True),
        "logit_sqnr_db_min": Threshold(-3.5),
    }
    assert second.expect.given() == {"drop_max": Threshold(-0.1)}


def test_a_run_says_where_it_computes_whatever_its_file_says(write_config):
    path = write_config("runs: [{name: a, config: gpu.yaml, run: {cpu: true}, expect: {top1_min: 9}}]")
    (path.parent / "gpu.yaml").write_text("run: {gpus: 0, seed: 3}")
    (run,) = load_gate(path).runs
    assert (run.config.run.chosen_device, run.config.run.gpus, run.config.run.seed) == ("cpu", None, 3)


@pytest.mark.parametrize("text", ["98.5", "baseline", "baseline - 0.5", "baseline + 2"])
def test_a_threshold_reads_as_it_was_written(write_config, text):
    path = write_config(f"baseline: b\nruns: [{{name: a, expect: {{top1_min: {text}}}}}]")
    assert str(load_gate(path).runs[0].expect.top1_min) == text


def test_all_problems_of_all_files_come_together(write_config):
    path = write_config(
        "eror_rate: 0.1\n"
        "judge: mean\n"
        "runs:\n"
        "  - name: a\n"
        "    config: other.yaml\n"
        "    quantizers:\n"
        "      bits_wieghts: 4\n"
        "    expect:\n"
        "      top_1: 97\n"
        "      drop_max: 101\n"
        "      agreement_min: baseline - 1\n"
        "  - name: a\n"
        "    quantizer: {mode: sym}\n"
        "    expect: {top1_min: much}\n"
        "  - expect: {}\n"
        "  - 7\n"
    )
    (path.parent / "other.yaml").write_text("\ndata: {batch_size: none}\n")
    assert problems(path) == [
        "config.yaml:1: check: unknown key 'eror_rate'; did you mean 'error_rate'?",
        "config.yaml:2: check.judge: 'mean' is not one of 'interval', 'point'.",
        "config.yaml:7: quantizers: unknown key 'bits_wieghts'; did you mean 'bits_weights' or "
        "'clip_weights' or 'save_fp_weights'?",
        "config.yaml:9: runs.0.expect: unknown key 'top_1'; did you mean 'top1_min'?",
        "config.yaml:10: runs.0.expect.drop_max: 101 is not in the range -100<=x<=100.",
        "config.yaml:11: runs.0.expect.agreement_min: found baseline - 1, but no baseline; "
        "name its file at the top, as in 'baseline: baseline.json'",
        "config.yaml:12: runs.1.name: 'a' is another run's name; choose a new one",
        "config.yaml:13: runs.1: unknown key 'quantizer'; did you mean 'quantizers'?",
        "config.yaml:14: runs.1.expect.top1_min: 'much' is not a number, or such as 'baseline - 0.5'.",
        "config.yaml:15: runs.2.expect: nothing is expected; state some of top1_min, drop_max, "
        "agreement_min, logit_sqnr_db_min",
        "config.yaml:15: runs.2: has no name; one is wanted, to speak of it",
        "config.yaml:16: runs.3: found int; a mapping with a name is wanted",
        "other.yaml:2: data.batch_size: 'none' is not a valid integer range.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml:1: runs: found nothing; a list of runs is wanted"),
        ("runs: {a: 1}", "config.yaml:1: runs: found dict; a list of runs is wanted"),
        ("run: [a]", "config.yaml:1: check: unknown key 'run'; did you mean 'runs'?"),
        ("runs: [", "config.yaml: not valid YAML"),
        ("- name: a", "config.yaml:1: found list"),
        (
            "runs: [{name: a, quantizers: {clip_activations: n_std}, expect: {top1_min: 1}}]",
            "config.yaml:1: runs.0: --qe-clip-acts n_std: needs --qe-clip-n-stds",
        ),
        ("runs: [{name: a, config: no.yaml, expect: {top1_min: 1}}]", "no.yaml: cannot be read"),
        ("runs: [{name: a, model: 3, expect: {top1_min: 1}}]", "config.yaml:1: model: found 3; a mapping"),
        ("runs: [{name: a, name: b}]", "config.yaml:1: key 'name' stands a second time"),
        ("runs: [{name: a, expect: {top1_min: .nan}}]", "top1_min: nan is not in the range"),
        ("runs: [{name: a, expect: {logit_sqnr_db_min: .inf}}]", "inf is not in the range"),
        ("error_rate: 0\nruns: []", "config.yaml:1: check.error_rate: 0 is not in the range 0<x<=0.5"),
    ],
)
def test_a_broken_file_says_where(write_config, text, message):
    assert any(problem.startswith(message) or message in problem for problem in problems(write_config(text)))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(["runs", "name", "expect", "top1_min", "quantizers", "config", "judge", "x"])
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(keys, trees, max_size=4) | trees)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_yaml_gives_a_gate_or_a_config_error(write_config, tree):
    path = write_config(yaml.safe_dump(tree))
    try:
        assert load_gate(path).runs
    except ConfigError as error:
        assert str(error)
