"""Evidence made by hand, and its judge."""

from types import SimpleNamespace

import numpy as np
import pytest

from qtool.config import Config
from qtool.config.gate import Expect, GateRun, ThresholdType
from qtool.pipeline.gate.baseline import Stored
from qtool.pipeline.gate.measure import Evidence
from qtool.pipeline.gate.verdicts import Judge

ANY_NUMBER = ThresholdType(-1000, 1000)
INPUTS = {"arch": "net", "checkpoint_sha256": None, "images": 1000, "seed": 0}


def make_evidence(images: int = 1000, losses: int = 0, gains: int = 0, wrong: int = 20, **values) -> Evidence:
    """The first images are losses, the next gains, the next wrong in both; losses and gains disagree."""
    number = np.arange(images)
    loss, gain = number < losses, (losses <= number) & (number < losses + gains)
    both_wrong = ~loss & ~gain & (number < losses + gains + wrong)
    arrays = {
        "indices": number,
        "float_correct": ~gain & ~both_wrong,
        "correct": ~loss & ~both_wrong,
        "agree": ~loss & ~gain,
    }
    return Evidence(**(arrays | {"signal": 1000.0, "noise": 1.0} | values))


@pytest.fixture
def evidence():
    return make_evidence


@pytest.fixture
def make_judge():
    """make_judge(top1_min=97, stored=..., sequential=True) -> Judge with error rate 0.05."""

    def make(
        stored: Stored | None = None,
        sequential: bool = False,
        how: str = "interval",
        inputs: dict = INPUTS,
        images: int = 1000,
        **expected: object,
    ) -> Judge:
        expect = Expect(**{key: ANY_NUMBER.convert(value, None, None) for key, value in expected.items()})
        bench = SimpleNamespace(inputs=inputs, numbers=np.arange(images))
        return Judge(GateRun("run", Config(), expect, how), 0.05, sequential, stored, bench)

    return make


@pytest.fixture
def store():
    """store(evidence) -> Stored, as a baseline of these images holds it."""

    def make(evidence: Evidence, images: int = 1000, **inputs: object) -> Stored:
        return Stored.of(evidence, INPUTS | inputs, np.arange(images))

    return make
