"""What is counted of a batch, and what tells two networks apart."""

import copy

import numpy as np
import pytest
import torch

from qtool.pipeline.gate.measure import compare_batch, weights_sha256
from qtool.report import Result, compare


def result(logits: torch.Tensor, labels: torch.Tensor) -> Result:
    right = logits.argmax(dim=1) == labels
    top1 = 100 * float(right.double().mean())
    indices = torch.arange(len(labels))
    return Result(top1, 100.0, 0.0, len(labels), 1.0, labels, logits.argmax(dim=1), logits, indices)


def test_batches_together_give_the_numbers_of_qtool_quantize():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator)
    logits_q = logits + 0.3 * torch.randn(40, 5, generator=generator)
    labels = torch.randint(5, (40,), generator=generator)
    parts = [compare_batch(result(logits[s], labels[s]), result(logits_q[s], labels[s])) for s in HALVES]
    whole = compare(result(logits, labels), result(logits_q, labels))
    values = (parts[0] + parts[1]).values()
    assert values["drop"] == pytest.approx(-whole.top1_difference)
    assert values["agreement"] == pytest.approx(whole.agreement)
    assert values["logit_sqnr_db"] == pytest.approx(whole.logit_sqnr_db)


HALVES = (slice(0, 17), slice(17, 40))


def test_a_network_without_finite_logits_has_the_worst_sqnr(evidence):
    assert evidence(noise=np.nan).values()["logit_sqnr_db"] == -np.inf
    assert evidence(noise=0.0).values()["logit_sqnr_db"] == np.inf


def test_the_hash_is_of_every_weight(tiny_net):
    other = copy.deepcopy(tiny_net)
    assert weights_sha256(other) == weights_sha256(tiny_net)
    with torch.no_grad():
        other.fc.bias[3] += 1e-6
    assert weights_sha256(other) != weights_sha256(tiny_net)
