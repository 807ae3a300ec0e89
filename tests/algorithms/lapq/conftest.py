"""A small problem for LAPQ: a range alone, and tiny_net with all its ranges."""

from collections.abc import Callable

import pytest
import torch

import qtool
from qtool.algorithms.lapq import LapqSpec, SearchedTensor, sample_outputs, searched_tensors
from qtool.config import QuantizeConfig
from qtool.graph.trace import trace
from qtool.numerics.spec import QuantSpec
from qtool.pipeline.steps import specs_for
from qtool.search.trials import Trials


@pytest.fixture(scope="session")
def tensor() -> Callable[..., SearchedTensor]:
    """A range around [-1, 3] of an output."""

    def make(grid: QuantSpec, numbers: int = 1, values: torch.Tensor | None = None) -> SearchedTensor:
        values = torch.linspace(-1, 3, 101) if values is None else values
        low, high = torch.tensor(-1.0), torch.tensor(3.0)
        return SearchedTensor("conv1", "output", grid, low, high, (1.0, 1.0), numbers, values)

    return make


@pytest.fixture
def trials(tiny_net, tiny_batches) -> Trials:
    """tiny_net on its batches; the labels are its own predictions."""
    labels = [tiny_net(x).argmax(1) for x in tiny_batches]
    traced = trace(tiny_net, tiny_batches[0])
    return Trials(
        traced, qtool.calibrate(tiny_net, tiny_batches), list(zip(tiny_batches, labels, strict=True))
    )


@pytest.fixture
def problem(trials):
    """The ranges of tiny_net at 4 bits, and its specs."""

    def make(settings: LapqSpec, **options):
        specs = specs_for(trials.folded.traced, QuantizeConfig(bits_activations=4, bits_weights=4, **options))
        outputs = sample_outputs(trials.folded.traced, [x for x, _ in trials.batches])
        return searched_tensors(trials.folded.traced, trials.stats, specs, outputs, settings), specs

    return make
