"""Logits wherever a network keeps them, and a message that says what it gives instead."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from qtool.numerics.logits import logits_of

LOGITS = torch.arange(6.0).reshape(2, 3)
OTHER = torch.zeros(2, 3)


@dataclass
class Output:
    features: torch.Tensor
    logits: torch.Tensor


Named = namedtuple("Named", "aux out")


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, OTHER),
        [LOGITS],
        {"features": OTHER, "logits": LOGITS},
        OrderedDict(out=LOGITS, aux=OTHER),
        {"scores": LOGITS},
        Output(OTHER, LOGITS),
        Named(OTHER, LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_logits_are_found(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    "output, words",
    [
        (torch.zeros(2, 3, 8, 8), r"a tensor of shape \(2, 3, 8, 8\)"),
        ({"boxes": OTHER, "scores": OTHER}, "a dict with 'boxes', 'scores'"),
        ((torch.zeros(2), OTHER), r"a tuple of 2, the first a tensor of shape \(2,\)"),
        ((), "a tuple of 0"),
        (None, "a NoneType"),
    ],
)
def test_anything_else_is_named(output, words):
    with pytest.raises(
        ValueError, match=rf"gives {words}; qtool evaluates classifiers, .* 'logits' or 'out'"
    ):
        logits_of(output)
