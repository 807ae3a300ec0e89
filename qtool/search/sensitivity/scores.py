"""How far logits are from those of the float network, as one number for each way of asking."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from qtool.numerics.metrics import ratio_db, top_k_correct

SQNR, KL, LOSS, TOP1 = "sqnr", "kl", "loss", "top1"
METRICS = (SQNR, KL, LOSS, TOP1)


@dataclass(frozen=True)
class Score:
    """The harm that was done to a network's logits; 0 is none. None where it was not measured.

    Args:
        noise: squared differences of the logits, as a share of the squared float logits.
        kl: mean of KL(softmax(float) || softmax(changed)) over the images, nats.
        loss: how much the mean cross-entropy has grown.
        top1: percentage points of top-1 that were lost.
    """

    noise: float | None = None
    kl: float | None = None
    loss: float | None = None
    top1: float | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Of the logits; inf without noise."""
        return None if self.noise is None else ratio_db(1.0, self.noise)

    def harm(self, metric: str) -> float:
        """The number that a metric compares, larger for more harm.

        Raises:
            ValueError: if it was not measured.
        """
        value = {SQNR: self.noise, KL: self.kl, LOSS: self.loss, TOP1: self.top1}[metric]
        if value is None:
            raise ValueError(f"{metric} was not measured")
        return value

    def key(self, metric: str) -> tuple[float, ...]:
        """For sorting by a metric; few images tell few steps of top-1 apart, and the loss decides between."""
        return (self.harm(TOP1), self.harm(LOSS)) if metric == TOP1 else (self.harm(metric),)


class LogitSums:
    """Adds up what a Score is made of, batch by batch, in float64."""

    def __init__(self) -> None:
        self.images = 0
        self.signal = self.noise = self.kl = self.loss = 0.0
        self.lost = 0

    def add(self, expected: Tensor, found: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            expected: logits of the float network, (N, C).
            found: of the other, (N, C).
            labels: (N,), int64.
        """
        a, b = expected.double(), found.double()
        self.images += len(labels)
        self.signal += float(a.square().sum())
        self.noise += float((a - b).square().sum())
        log_a, log_b = a.log_softmax(1), b.log_softmax(1)
        self.kl += float((log_a.exp() * (log_a - log_b)).sum())
        self.loss += float(F.nll_loss(log_b, labels, reduction="sum"))
        self.loss -= float(F.nll_loss(log_a, labels, reduction="sum"))
        self.lost += int(top_k_correct(expected, labels, 1).sum()) - int(
            top_k_correct(found, labels, 1).sum()
        )

    def score(self) -> Score:
        """Of all batches.

        Raises:
            ValueError: if there were none.
        """
        if not self.images:
            raise ValueError("no images")
        images = self.images
        noise = self.noise / self.signal if self.signal else float("inf") if self.noise else 0.0
        return Score(noise, self.kl / images, self.loss / images, 100 * self.lost / images)
