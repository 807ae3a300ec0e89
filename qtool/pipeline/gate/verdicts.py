"""Judge what was measured: pass, fail, or too few images to tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtool.config.gate import GateRun, Threshold
from qtool.numerics.intervals import Interval, betting_interval, clopper_pearson, paired_interval
from qtool.pipeline.gate.baseline import Stored
from qtool.pipeline.gate.measure import Bench, Evidence

PASS, FAIL, UNDECIDED, CHANGED = "pass", "fail", "undecided", "changed"

# Counts are exact; only the limit comes from decimal numbers.
ROUNDING = 1e-12
MOST_IMAGES = 10_000_000

VALUE_OF = {
    "top1_min": "top1",
    "drop_max": "drop",
    "agreement_min": "agreement",
    "logit_sqnr_db_min": "logit_sqnr_db",
}
# Those that are counted from images, and what is true of the good ones.
GOOD_IMAGES = {"top1_min": "correct", "drop_max": "correct", "agreement_min": "agree"}


@dataclass(frozen=True)
class Claim:
    """That images are, on average, at most so bad: a loss is 1, a gain -1, any other image 0.

    Args:
        losses, gains, images: how many.
        limit: on (losses - gains) / images.
        paired: whether gains can occur.
        origin, direction: the mean m is shown as origin + direction * 100 * m, such as 100 - 100 * m
            for the top-1 of which m is the error.
    """

    losses: int
    gains: int
    images: int
    limit: float
    paired: bool
    origin: float
    direction: int

    @property
    def mean(self) -> float:
        """What was measured."""
        return (self.losses - self.gains) / self.images

    def shown(self, mean: float) -> float:
        """A mean in the units of the expectation."""
        return self.origin + self.direction * 100 * mean

    def scaled(self, images: int) -> Claim:
        """The same with more images of the same kind."""
        factor = images / self.images
        losses, gains = round(self.losses * factor), round(self.gains * factor)
        return Claim(losses, gains, images, self.limit, self.paired, self.origin, self.direction)

    def interval(self, error_rate: float, sequential: bool) -> Interval:
        """Bounds on the mean, for one look or for any number of looks."""
        if sequential:
            counts = [self.gains, self.images - self.losses - self.gains, self.losses]
            values = (-1, 0, 1)
            start = 0 if self.paired else 1
            return betting_interval(values[start:], np.array(counts[start:]), error_rate)
        if self.paired:
            return paired_interval(self.losses, self.gains, self.images, error_rate)
        return clopper_pearson(self.losses, self.images, error_rate)

    def verdict(self, interval: Interval) -> str:
        """Pass if all of the interval is within the limit, fail if none is."""
        low, high = interval
        if high <= self.limit + ROUNDING:
            return PASS
        return FAIL if low > self.limit + ROUNDING else UNDECIDED

    def images_needed(self, error_rate: float, sequential: bool) -> int | None:
        """About how many images would decide, if they are like these; None if too many would."""

        def decides(images: int) -> bool:
            claim = self.scaled(images)
            return claim.verdict(claim.interval(error_rate, sequential)) != UNDECIDED

        too_few, enough = self.images, 2 * self.images
        while not decides(enough):
            too_few, enough = enough, 2 * enough
            if enough > MOST_IMAGES:
                return None
        while enough - too_few > 0.01 * enough + 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if decides(middle) else (middle, enough)
        step = int(10 ** max(0, len(str(enough)) - 2))  # two digits are certain enough
        return -(-enough // step) * step


@dataclass(frozen=True)
class Finding:
    """An expectation, judged.

    Args:
        key: of the expectation, such as "top1_min".
        wanted: as it was stated.
        limit, found: in the units of the expectation; no limit where inputs differ from the baseline's.
        verdict: PASS, FAIL, UNDECIDED or CHANGED.
        images: how many it rests on.
        bounds: each of them one-sided; None where sampling error does not count.
        images_needed: about how many would decide; None if too many would, or it is decided.
        changes: why it cannot be compared with the baseline.
    """

    key: str
    wanted: Threshold
    limit: float | None
    found: float
    verdict: str
    images: int
    bounds: tuple[float, ...] | None = None
    images_needed: int | None = None
    changes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """What to say of a verdict that is not a pass."""
        if self.verdict == CHANGED:
            return f"not compared, as inputs differ: {'; '.join(self.changes)}"
        assert self.limit is not None
        if self.verdict == FAIL:
            side = "below" if self.key.endswith("_min") else "above"
            return f"{self.found:.3f} is {abs(self.found - self.limit):.3f} {side} {self.limit:.3f}"
        if self.images_needed is None:
            enough = f"more than {MOST_IMAGES:,} images like these would be needed, as the two are so close"
        else:
            enough = f"about {self.images_needed:,} images like these would do"
        return f"{self.images:,} images cannot tell {self.found:.3f} from {self.limit:.3f}; {enough}"


class Judge:
    """Judges the expectations of one run, as the evidence comes in.

    Args:
        run: what is expected.
        error_rate: of each verdict.
        sequential: whether there is a look after every batch.
        stored: the baseline's values of this run, if there are any.
        inputs, numbers: of the bench.
    """

    def __init__(
        self, run: GateRun, error_rate: float, sequential: bool, stored: Stored | None, bench: Bench
    ) -> None:
        self._run = run
        self._error_rate = error_rate
        self._sequential = sequential
        self._stored = stored
        self._numbers = bench.numbers
        self.changes = [] if stored is None else stored.changes(bench.inputs)
        self._certain: dict[str, Finding] = {}

    def look(self, evidence: Evidence) -> bool:
        """Note the verdicts that are certain by now; whether all of them are.

        Without sequential none is, before all images have been seen; SQNR never is, having no interval.
        """
        expected = self._run.expect.given()
        if not self._sequential or self._run.judge != "interval":
            return False
        for key, threshold in expected.items():
            if key in GOOD_IMAGES and key not in self._certain:
                finding = self._judge(key, threshold, evidence)
                if finding.verdict != UNDECIDED:
                    self._certain[key] = finding
        return len(self._certain) == len(expected)

    def findings(self, evidence: Evidence) -> list[Finding]:
        """All verdicts, when no more images come."""
        return [
            self._certain.get(key) or self._judge(key, threshold, evidence, last=True)
            for key, threshold in self._run.expect.given().items()
        ]

    def _judge(self, key: str, threshold: Threshold, evidence: Evidence, last: bool = False) -> Finding:
        found = evidence.values()[VALUE_OF[key]]
        stored = self._stored if threshold.from_baseline else None
        changes = () if stored is None else (*self.changes, *self._unpaired(key, stored, evidence, last))
        if changes:
            return Finding(key, threshold, None, found, CHANGED, evidence.images, changes=changes)
        if key not in GOOD_IMAGES:
            limit = threshold.value + (0 if stored is None else stored.values[VALUE_OF[key]])
            verdict = PASS if found >= limit - ROUNDING else FAIL
            return Finding(key, threshold, limit, found, verdict, evidence.images)
        claim = self._claim(key, threshold, evidence, stored)
        if self._run.judge == "point":
            verdict = claim.verdict((claim.mean, claim.mean))
            return Finding(key, threshold, claim.shown(claim.limit), found, verdict, evidence.images)
        interval = claim.interval(self._error_rate, self._sequential)
        verdict = claim.verdict(interval)
        needed = last and verdict == UNDECIDED
        return Finding(
            key,
            threshold,
            claim.shown(claim.limit),
            found,
            verdict,
            evidence.images,
            bounds=tuple(sorted(map(claim.shown, interval))),
            images_needed=claim.images_needed(self._error_rate, self._sequential) if needed else None,
        )

    def _claim(self, key: str, threshold: Threshold, evidence: Evidence, stored: Stored | None) -> Claim:
        now = getattr(evidence, GOOD_IMAGES[key])
        if stored is not None:
            before = getattr(stored, GOOD_IMAGES[key])[self._positions(evidence)]
        else:
            before = evidence.float_correct if key == "drop_max" else np.ones_like(now)
        direction = 1 if key == "drop_max" else -1
        origin = 100 * float(before.mean())
        if key == "drop_max":
            origin = 100 * float(evidence.float_correct.mean()) - origin
        limit = threshold.value + (0 if stored is None else origin)
        return Claim(
            losses=int((before & ~now).sum()),
            gains=int((now & ~before).sum()),
            images=len(now),
            limit=direction * (limit - origin) / 100,
            paired=stored is not None or key == "drop_max",
            origin=origin,
            direction=direction,
        )

    def _positions(self, evidence: Evidence) -> NDArray[np.intp]:
        return np.searchsorted(self._numbers, evidence.indices)

    def _unpaired(self, key: str, stored: Stored, evidence: Evidence, last: bool) -> list[str]:
        """What the inputs do not tell: images that could be read only then, or now, and the float network."""
        here = self._positions(evidence)
        new, gone = int((~stored.seen[here]).sum()), int(stored.seen.sum()) - len(here)
        changes = [f"{new} images are not in the baseline, as they could not be read"] if new else []
        changes += [f"{gone} images of the baseline cannot be read"] if last and gone > 0 else []
        other = int((stored.float_correct[here] != evidence.float_correct).sum())
        if key == "drop_max" and other and not changes:
            changes.append(f"the float network is right, or wrong, on {other} other images than then")
        return changes
