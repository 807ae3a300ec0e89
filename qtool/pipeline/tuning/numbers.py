"""What is told of evaluations: parts of them, errors of logits, and the numbers of the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.pipeline import steps
from qtool.report import Result, compare
from qtool.search.outcomes import rounded


def rows_of(result: Result, images: Sequence[int]) -> Result:
    """The part of a result that is of some images, by their numbers in the dataset, in that order."""
    assert result.indices is not None
    place = {int(number): i for i, number in enumerate(result.indices)}
    rows = torch.tensor([place[number] for number in images if number in place])
    seconds = result.seconds * len(rows) / result.images
    return steps.summarize(result.labels[rows], result.logits[rows], seconds, result.indices[rows])


def relative_errors(float_logits: Tensor, logits: Tensor) -> Tensor:
    """The normalized squared error of each image's logits, (N,)."""
    off = (float_logits.double() - logits.double()).square().sum(dim=1)
    return off / float_logits.double().square().sum(dim=1).clamp(min=1e-30)


def numbers(float_result: Result, result: Result, worst: int) -> dict[str, Any]:
    """What the history says of an evaluation.

    Args:
        float_result, result: on the same images.
        worst: of how many images, those with the largest error, the numbers are given.
    """
    comparison = compare(float_result, result)
    errors = relative_errors(float_result.logits, result.logits)
    ranked = sorted(range(len(errors)), key=lambda i: (-rounded(float(errors[i])), i))[:worst]
    assert result.indices is not None
    return {
        "top1": result.top1,
        "top5": result.top5,
        "loss": rounded(result.loss),
        "images": result.images,
        "top1_difference": rounded(comparison.top1_difference),
        "top1_standard_error": rounded(comparison.top1_standard_error),
        "agreement": comparison.agreement,
        "logit_sqnr_db": rounded(comparison.logit_sqnr_db),
        "worst": sorted(int(result.indices[i]) for i in ranked),
    }
