"""Pass, fail, too few images, and what cannot be compared; and how often a verdict is wrong."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from qtool.pipeline.gate.verdicts import FAIL, PASS, UNDECIDED, Claim


def verdicts(judge, evidence) -> list[str]:
    return [finding.verdict for finding in judge.findings(evidence)]


@pytest.mark.parametrize(
    ("expected", "verdict"),
    [
        ({"top1_min": 94}, "pass"),  # found 96
        ({"top1_min": 95.5}, "undecided"),
        ({"top1_min": 98}, "fail"),
        ({"drop_max": 3}, "pass"),  # found 1
        ({"drop_max": 1.5}, "undecided"),
        ({"drop_max": -0.5}, "fail"),
        ({"agreement_min": 95}, "pass"),  # found 97
        ({"agreement_min": 96.5}, "undecided"),
        ({"agreement_min": 99}, "fail"),
        ({"logit_sqnr_db_min": 30}, "pass"),  # found 30
        ({"logit_sqnr_db_min": 30.1}, "fail"),
    ],
)
def test_verdict_of_the_interval(make_judge, evidence, expected, verdict):
    assert verdicts(make_judge(**expected), evidence(losses=20, gains=10)) == [verdict]


@pytest.mark.parametrize(("top1_min", "verdict"), [(96, "pass"), (96.01, "fail")])
def test_point_compares_the_number_itself(make_judge, evidence, top1_min, verdict):
    (finding,) = make_judge(how="point", top1_min=top1_min).findings(evidence(losses=20, gains=10))
    assert (finding.verdict, finding.bounds) == (verdict, None)


def test_a_failure_says_by_how_much(make_judge, evidence):
    findings = make_judge(top1_min=98, drop_max=-1).findings(evidence(losses=20, gains=10))
    assert [f.reason for f in findings] == ["96.000 is 2.000 below 98.000", "1.000 is 2.000 above -1.000"]


@pytest.mark.parametrize("sequential", [False, True])
def test_as_many_images_as_it_says_would_do(make_judge, evidence, sequential):
    (finding,) = make_judge(sequential=sequential, drop_max=1.5).findings(evidence(losses=20, gains=10))
    assert finding.verdict == UNDECIDED
    assert f"about {finding.images_needed:,} images like these would do" in finding.reason
    more = Claim(20, 10, 1000, 0.015, paired=True, origin=0, direction=1).scaled(finding.images_needed)
    assert more.verdict(more.interval(0.05, sequential)) == PASS
    fewer = more.scaled(int(0.9 * finding.images_needed))
    assert fewer.verdict(fewer.interval(0.05, sequential)) == UNDECIDED


def test_no_number_of_images_tells_a_value_from_itself(make_judge, evidence):
    (finding,) = make_judge(drop_max=1).findings(evidence(losses=20, gains=10))
    assert finding.images_needed is None
    assert "more than 10,000,000 images" in finding.reason


def test_bounds_are_shown_around_the_number(make_judge, evidence, store):
    now, before = evidence(losses=20, gains=10), store(evidence(losses=5, gains=10, wrong=35))
    expected = {"top1_min": 96, "drop_max": 1, "agreement_min": 97}
    findings = make_judge(**expected).findings(now)
    findings += make_judge(before, top1_min="baseline - 2", agreement_min="baseline - 2").findings(now)
    for finding in findings:
        assert finding.bounds[0] < finding.found < finding.bounds[1]


def test_against_the_baseline_images_are_paired(make_judge, evidence, store):
    now = evidence(losses=20, gains=10)
    judge = make_judge(
        store(now),
        top1_min="baseline - 0.8",
        drop_max="baseline + 0.8",
        agreement_min="baseline - 0.8",
        logit_sqnr_db_min="baseline",
    )
    findings = judge.findings(now)
    assert [f.verdict for f in findings] == [PASS] * 4
    # Unpaired, 96 % of 1000 images has bounds that are a whole point away.
    assert [round(f.limit, 6) for f in findings] == [95.2, 1.8, 96.2, 30.0]


def test_a_loss_against_the_baseline_fails(make_judge, evidence, store):
    judge = make_judge(store(evidence()), top1_min="baseline", agreement_min="baseline")
    assert verdicts(judge, evidence(losses=30)) == [FAIL, FAIL]


def test_other_inputs_are_not_compared(make_judge, evidence, store):
    before = store(evidence(), seed=1, checkpoint_sha256="a" * 64)
    judge = make_judge(before, top1_min="baseline", drop_max=5)
    relative, absolute = judge.findings(evidence())
    assert (relative.verdict, relative.limit, absolute.verdict) == ("changed", None, "pass")
    assert relative.reason == (
        "not compared, as inputs differ: checkpoint_sha256: aaaaaaaaaaaa in the baseline, None now; "
        "seed: 1 in the baseline, 0 now"
    )


def test_another_float_network_is_not_compared_by_its_drop(make_judge, evidence, store):
    judge = make_judge(store(evidence(wrong=25)), top1_min="baseline", drop_max="baseline")
    assert verdicts(judge, evidence(wrong=20)) == ["undecided", "changed"]


def test_images_that_can_be_read_only_now_are_not_compared(make_judge, evidence, store):
    judge = make_judge(store(evidence(images=990)), how="point", top1_min="baseline")
    (finding,) = judge.findings(evidence())
    assert finding.changes == ("10 images are not in the baseline, as they could not be read",)


def test_images_that_can_be_read_no_more_are_not_compared(make_judge, evidence, store):
    (finding,) = make_judge(store(evidence()), how="point", top1_min="baseline").findings(
        evidence(images=990)
    )
    assert finding.changes == ("10 images of the baseline cannot be read",)


def test_a_look_keeps_what_is_certain(make_judge, evidence):
    judge = make_judge(sequential=True, top1_min=90)
    assert not judge.look(evidence(images=20, wrong=0))
    assert judge.look(evidence(images=200, wrong=0))
    (finding,) = judge.findings(evidence(images=300, wrong=100))
    assert (finding.verdict, finding.images) == (PASS, 200)


def test_sqnr_waits_for_all_images(make_judge, evidence):
    assert not make_judge(sequential=True, top1_min=90, logit_sqnr_db_min=1).look(evidence(images=900))


def test_without_sequential_no_look_ends_a_run(make_judge, evidence):
    assert not make_judge(top1_min=1).look(evidence())


@pytest.fixture(scope="module")
def simulation():
    path = Path(__file__).parents[3] / "benchmarks" / "gate_simulation.py"
    spec = importlib.util.spec_from_file_location("gate_simulation", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Of 1000 gates, more than 72 wrong ones have a chance below 0.001 where the error rate is 0.05.
MOST_WRONG = 72


@pytest.mark.parametrize("images", [300, 2000])
def test_at_the_limit_few_gates_are_wrong(simulation, images):
    truth = simulation.Truth(0.015, 0.005, 0.01, images)
    found = simulation.one_look(truth, 1000, np.random.default_rng(1))
    assert max(found[PASS], found[FAIL]) <= MOST_WRONG
    assert found[UNDECIDED] > 0


def test_at_the_limit_few_gates_are_wrong_under_repeated_looks(simulation):
    truth = simulation.Truth(0.015, 0.005, 0.01, 10_000)
    counts = simulation.looks(truth, 1000, np.random.default_rng(1))
    found, _ = simulation.sequential(truth, counts)
    assert found[PASS] + found[FAIL] <= 2 * MOST_WRONG
    assert max(found[PASS], found[FAIL]) <= MOST_WRONG
    naive, _ = simulation.repeated_normal(truth, counts)
    assert max(naive[PASS], naive[FAIL]) > 3 * MOST_WRONG


def test_the_simulated_looks_are_those_of_the_gate(simulation):
    truth = simulation.Truth(0.002, 0.002, 0.01, 3000)
    counts = simulation.looks(truth, 5, np.random.default_rng(1))
    slow = [next((v for v in map(by_the_gate, gate) if v != UNDECIDED), UNDECIDED) for gate in counts]
    fast, _ = simulation.sequential(truth, counts)
    assert {verdict: slow.count(verdict) for verdict in (PASS, FAIL, UNDECIDED)} == fast
    assert fast[PASS] > 0


def by_the_gate(counts) -> str:
    gains, _, losses = map(int, counts)
    claim = Claim(losses, gains, int(counts.sum()), 0.01, paired=True, origin=0, direction=1)
    return claim.verdict(claim.interval(0.05, sequential=True))
