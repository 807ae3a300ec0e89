"""How much accuracy may be lost: one rule of comparison, and what a measured difference says for all images.

Scores are metrics turned so that higher is better: top-1 and top-5 as they are, the loss with a minus. A
network meets the goal if its drop is at most what is allowed, the limit included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

HIGHER, LOWER = 1, -1
# Whether a metric is better when it is higher or lower.
METRICS = {"top1": HIGHER, "top5": HIGHER, "loss": LOWER}
UNITS = {"top1": "points of top-1", "top5": "points of top-5", "loss": "of loss"}
# Counts of images are exact; only writing them as percent is not.
ROUNDING = 1e-9


def drop_of(float_score: float, score: float, relative: bool) -> float:
    """What a score is below that of the float network; negative if it is above.

    Args:
        float_score, score: higher is better, of any sign.
        relative: as a share of the float network's, in which case a float score of 0 makes it absolute.

    Example:
        >>> round(drop_of(0.3185, 0.2923, False), 4), round(drop_of(0.3185, 0.2923, True), 8)
        (0.0262, 0.0822606)

    Reference:
        NNCF's accuracy control, which gives no relative drop above the float score.
    """
    if not relative or float_score == 0:
        return float_score - score
    return math.copysign(abs(1 - score / float_score), float_score - score)


@dataclass(frozen=True)
class Goal:
    """The accuracy that is to be kept.

    Args:
        metric: one of METRICS.
        max_drop: in points of top-1 or top-5, or units of loss; percent of the float network's if relative.
        relative: whether it is.
    """

    metric: str = "top1"
    max_drop: float = 0.5
    relative: bool = False

    def score(self, value: float) -> float:
        """A metric's value, turned so that higher is better."""
        return METRICS[self.metric] * value

    def drop(self, float_value: float, value: float) -> float:
        """How much a value of the metric is worse than the float network's, in the units of max_drop."""
        relative = self.relative and float_value != 0
        found = drop_of(self.score(float_value), self.score(value), relative)
        return 100 * found if relative else found

    def met(self, float_value: float, value: float) -> bool:
        """Whether it is worse by no more than is allowed."""
        return self.drop(float_value, value) <= self.max_drop + ROUNDING * max(1.0, abs(self.max_drop))

    def target(self, float_value: float) -> float:
        """The value of the metric at which the goal is just met.

        Example:
            >>> Goal(max_drop=1.0).target(70.0), Goal(max_drop=1.0, relative=True).target(70.0)
            (69.0, 69.3)
        """
        factor, allowed = self._line(self.score(float_value))
        return METRICS[self.metric] * (factor * self.score(float_value) - allowed)

    def _line(self, float_score: float) -> tuple[float, float]:
        """The goal as score >= factor * float_score - allowed."""
        if not self.relative or float_score == 0:
            return 1.0, self.max_drop
        return 1 - math.copysign(self.max_drop / 100, float_score), 0.0

    def confidence(self, float_values: Tensor, values: Tensor) -> float:
        """How likely it is, given these images, that the goal is met on all images like them.

        Args:
            float_values, values: (N,), the metric of each image by itself: 0 or 100, or its loss.

        Returns:
            One-sided, 0 to 1, by the standard error of the paired difference; 0 or 1 where no image differs
            from the others in it.
        """
        sign = METRICS[self.metric]
        scores, float_scores = sign * values.double(), sign * float_values.double()
        factor, allowed = self._line(float(float_scores.mean()))
        margin = scores - factor * float_scores + allowed
        mean = float(margin.mean())
        spread = float(margin.std()) if len(margin) > 1 else 0.0
        if spread == 0:
            return float(mean >= -ROUNDING)
        return 0.5 * math.erfc(-mean / spread * math.sqrt(len(margin) / 2))

    def words(self) -> str:
        """The goal in words.

        Example:
            >>> Goal(max_drop=0.5).words(), Goal("loss", 2.0, relative=True).words()
            ('at most 0.5 points of top-1 lost', 'at most 2 % of loss lost')
        """
        if self.relative:
            return f"at most {self.max_drop:g} % {UNITS[self.metric].replace('points ', '')} lost"
        return f"at most {self.max_drop:g} {UNITS[self.metric]} lost"
