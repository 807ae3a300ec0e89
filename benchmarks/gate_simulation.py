"""How often `qtool check` is wrong: 10,000 gates on simulated images, with and without --sequential.

    python benchmarks/gate_simulation.py benchmarks/gate_simulation.md

Every gate draws its images: a loss (only float is right), a gain (only quantized is right), or neither,
with known probabilities. Where the true drop is exactly the limit, neither verdict may come up more
often than the error rate. Without --sequential the gate's own code judges the counts of all images.
With it, the same bettors look after every batch of 64, and the first to be rich enough decides.
For comparison, a usual interval (normal, one-sided) is looked at as often, which it is not made for.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qtool.numerics.intervals import log_capital
from qtool.pipeline.gate.verdicts import FAIL, PASS, UNDECIDED, Claim
from qtool.run_dir import write_text

GATES = 10_000
BATCH = 64
ERROR_RATE = 0.05
Z = 1.6449  # of a one-sided normal bound with that error rate


class Truth(NamedTuple):
    """What is true of every image of a gate, and what is asked."""

    losses: float
    gains: float
    limit: float
    images: int
    paired: bool = True

    @property
    def words(self) -> str:
        if not self.paired:
            return f"top-1 {100 - 100 * self.losses:g} %, at least {100 - 100 * self.limit:g} %"
        drop = 100 * (self.losses - self.gains)
        return (
            f"drop {drop:g}, at most {100 * self.limit:g} "
            f"(losses {100 * self.losses:g} %, gains {100 * self.gains:g} %)"
        )


TRUTHS = (
    Truth(0.010, 0.000, 0.01, 2000),
    Truth(0.015, 0.005, 0.01, 2000),
    Truth(0.055, 0.045, 0.01, 10_000),
    Truth(0.015, 0.005, 0.01, 300),
    Truth(0.030, 0.000, 0.03, 2000, paired=False),
    Truth(0.002, 0.002, 0.01, 10_000),
    Truth(0.015, 0.015, 0.01, 10_000),
    Truth(0.025, 0.005, 0.01, 10_000),
)


def one_look(truth: Truth, gates: int, rng: np.random.Generator) -> Counter[str]:
    """Verdicts of gates that see all their images at once."""
    shares = [truth.losses, truth.gains, 1 - truth.losses - truth.gains]
    draws = rng.multinomial(truth.images, shares, size=gates)
    verdicts: Counter[str] = Counter()
    for (losses, gains), times in Counter(map(tuple, draws[:, :2].tolist())).items():
        claim = Claim(losses, gains, truth.images, truth.limit, truth.paired, origin=0, direction=1)
        verdicts[claim.verdict(claim.interval(ERROR_RATE, sequential=False))] += times
    return verdicts


def looks(truth: Truth, gates: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Counts of (gain, neither, loss) so far, at every look, (gates, looks, 3)."""
    shares = [truth.gains, 1 - truth.losses - truth.gains, truth.losses]
    sizes = np.full(-(-truth.images // BATCH), BATCH)
    sizes[-1] = truth.images - BATCH * (len(sizes) - 1)
    return rng.multinomial(sizes, shares, size=(gates, len(sizes))).cumsum(axis=1)


def sequential(truth: Truth, counts: NDArray[np.int64]) -> tuple[Counter[str], float]:
    """Verdicts of gates that stop as soon as they are certain, and the images they take on average."""
    start = 0 if truth.paired else 1
    values, seen = (-1, 0, 1)[start:], counts[..., start:]
    rich = -np.log(ERROR_RATE)
    passes = log_capital(values, seen, truth.limit, below=True) >= rich
    fails = log_capital(values, seen, truth.limit, below=False) > rich
    return first_verdicts(passes, fails, counts.sum(axis=-1))


def repeated_normal(truth: Truth, counts: NDArray[np.int64]) -> tuple[Counter[str], float]:
    """The same with the usual interval, from the tenth look on, where it holds well enough for one look."""
    images = counts.sum(axis=-1)
    mean = (counts[..., 2] - counts[..., 0]) / images
    second = (counts[..., 2] + counts[..., 0]) / images
    error = Z * np.sqrt(np.maximum(second - mean**2, 0) / images)
    useful = (np.arange(images.shape[1]) >= 9) & (error > 0)
    passes, fails = (mean + error <= truth.limit) & useful, (mean - error > truth.limit) & useful
    return first_verdicts(passes, fails, images)


def first_verdicts(
    passes: NDArray[np.bool_], fails: NDArray[np.bool_], images: NDArray[np.int64]
) -> tuple[Counter[str], float]:
    """The verdicts of (gates, looks), each gate's at its first look that has one."""
    decided = passes | fails
    first = np.where(decided.any(axis=1), decided.argmax(axis=1), decided.shape[1] - 1)
    gate = np.arange(len(decided))
    passed, failed = int(passes[gate, first].sum()), int(fails[gate, first].sum())
    verdicts = Counter({PASS: passed, FAIL: failed, UNDECIDED: len(decided) - passed - failed})
    return verdicts, float(images[gate, first].mean())


def row(truth: Truth, method: str, verdicts: Counter[str], images: float) -> str:
    shares = (f"{100 * verdicts[verdict] / GATES:.2f}" for verdict in (PASS, FAIL, UNDECIDED))
    return f"| {truth.words} | {truth.images} | {method} | {' | '.join(shares)} | {images:.0f} |"


def main(path: Path) -> None:
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    rows = []
    for truth in TRUTHS:
        rows.append(row(truth, "all images", one_look(truth, GATES, rng), truth.images))
        counts = looks(truth, GATES, rng)
        rows.append(row(truth, "`--sequential`", *sequential(truth, counts)))
        rows.append(row(truth, "normal, repeated", *repeated_normal(truth, counts)))
    seconds = time.perf_counter() - start
    lines = [
        "# How often `qtool check` is wrong",
        "",
        "    python benchmarks/gate_simulation.py benchmarks/gate_simulation.md",
        "",
        f"{GATES:,} gates in each row, error rate {100 * ERROR_RATE:g} %, seed 0; shares in percent.",
        "In the first five truths the drop, or top-1, is exactly the limit: neither `pass` nor `fail` may",
        "exceed the error rate there, and 'normal, repeated' shows what an interval for one look does under",
        "repeated looks. In the last three one verdict is right, and the share of the other must not",
        "exceed the error rate.",
        f"The script took {seconds:.0f} s.",
        "",
        "| truth, limit | images | judged on | pass | fail | undecided | images taken |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
