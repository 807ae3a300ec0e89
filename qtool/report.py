"""Results: what an evaluation found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.numerics.metrics import paired_standard_error, sqnr_db


@dataclass(frozen=True, eq=False)
class Result:
    """What an evaluation found.

    Args:
        top1, top5: share of images whose label is the first, or among the first five, percent.
        loss: mean cross-entropy over the images.
        images: how many were evaluated.
        seconds: time spent in the network, data loading excluded.
        labels, predictions: (N,), int64, in the order of the images.
        logits: (N, C), float32.
        indices: (N,), int64, numbers of the images in their dataset, or None.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float
    labels: Tensor
    predictions: Tensor
    logits: Tensor
    indices: Tensor | None = None

    @property
    def images_per_second(self) -> float:
        """Images through the network in a second."""
        return self.images / self.seconds if self.seconds else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for results.json."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "images_per_second": round(self.images_per_second, 2),
        }


@dataclass(frozen=True)
class Comparison:
    """A float network and its quantized version on the same images.

    Args:
        top1_difference: quantized minus float, percentage points.
        top1_standard_error: of that difference, over the paired images, percentage points.
        agreement: share of images with the same prediction, percent.
        logit_sqnr_db: of the quantized logits against the float ones.
    """

    top1_difference: float
    top1_standard_error: float
    agreement: float
    logit_sqnr_db: float

    def as_dict(self) -> dict[str, float]:
        """The numbers, for results.json."""
        return dict(vars(self))


def compare(float_result: Result, quantized: Result) -> Comparison:
    """Put two results on the same images side by side.

    Raises:
        ValueError: if they are not of the same images.
    """
    pairs = [(float_result.labels, quantized.labels), (float_result.indices, quantized.indices)]
    if not all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None):
        raise ValueError("the two results are of different images")
    right = float_result.predictions == float_result.labels
    right_q = quantized.predictions == quantized.labels
    same = float_result.predictions == quantized.predictions
    return Comparison(
        top1_difference=quantized.top1 - float_result.top1,
        top1_standard_error=100 * paired_standard_error(right, right_q),
        agreement=100 * float(same.double().mean()),
        logit_sqnr_db=sqnr_db(float_result.logits, quantized.logits),
    )


def table(rows: dict[str, Result], comparison: Comparison | None = None) -> str:
    """A table for the terminal: one row for each result, and how they differ.

    Example:
        >>> labels = torch.tensor([0, 1])
        >>> r = Result(100.0, 100.0, 0.5, 2, 1.0, labels, labels, torch.eye(2))
        >>> print(table({"float": r}))
                       top-1    top-5     loss  images  images/s
        float        100.000  100.000   0.5000       2       2.0
    """
    lines = [f"{'':<11}{'top-1':>9}{'top-5':>9}{'loss':>9}{'images':>8}{'images/s':>10}"]
    lines += [
        f"{name:<11}{r.top1:>9.3f}{r.top5:>9.3f}{r.loss:>9.4f}{r.images:>8}{r.images_per_second:>10.1f}"
        for name, r in rows.items()
    ]
    if comparison is not None:
        lines.append(
            f"{'difference':<11}{comparison.top1_difference:>+9.3f}  points of top-1, standard error "
            f"{comparison.top1_standard_error:.3f} on paired images"
        )
        lines.append(
            f"{'agreement':<11}{comparison.agreement:>9.3f}  % of predictions equal; "
            f"logits SQNR {comparison.logit_sqnr_db:.1f} dB"
        )
    return "\n".join(lines)


def confusion_csv(labels: Tensor, predictions: Tensor, classes: int) -> str:
    """How often each class (row) was taken for each class (column).

    Example:
        >>> print(confusion_csv(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2))
        label,0,1
        0,1,0
        1,1,1
        <BLANKLINE>
    """
    counts = torch.bincount(labels * classes + predictions, minlength=classes * classes)
    rows = counts.reshape(classes, classes).tolist()
    header = ",".join(["label", *(str(c) for c in range(classes))])
    body = [",".join(str(n) for n in (label, *row)) for label, row in enumerate(rows)]
    return "\n".join([header, *body]) + "\n"
