"""The loss of training, by numbers."""

import math

import pytest
import torch

from qtool.algorithms.lsq.loss import distillation_loss, mixed_loss

LOGITS = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
WANTED = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
LABELS = torch.tensor([0, 0])


def test_distillation_is_the_mean_divergence_in_nats():
    p = 1 / (1 + math.exp(-1))
    first = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert distillation_loss(LOGITS, WANTED, 1.0).item() == pytest.approx(first / 2, rel=1e-5)
    assert distillation_loss(WANTED, WANTED, 3.0).item() == 0


def test_the_size_of_gradients_hardly_depends_on_the_temperature():
    sizes = []
    for temperature in (10.0, 20.0):
        logits = LOGITS.clone().requires_grad_()
        distillation_loss(logits, WANTED, temperature).backward()
        sizes.append(float(logits.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_the_share_of_distillation_is_what_was_asked_for():
    soft = distillation_loss(LOGITS, WANTED, 2.0)
    hard = torch.nn.functional.cross_entropy(LOGITS, LABELS)
    assert torch.equal(mixed_loss(LOGITS, None, LABELS, 0.0, 2.0), hard)
    assert torch.equal(mixed_loss(LOGITS, WANTED, None, 1.0, 2.0), soft)
    torch.testing.assert_close(mixed_loss(LOGITS, WANTED, LABELS, 0.25, 2.0), 0.25 * soft + 0.75 * hard)
