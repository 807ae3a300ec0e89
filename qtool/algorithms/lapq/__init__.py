"""LAPQ: choose the ranges of all tensors together, by the loss of the quantized network.

Two steps. Each tensor alone gets the range whose quantization error is smallest in the p-norm; p is
the one whose ranges give the network the smallest loss, found by a parabola through several. From
there a search without derivatives moves all ranges together.

Reference:
    Nahshan et al. 2021, "Loss Aware Post-training Quantization", arXiv:1911.07190.
"""

from qtool.algorithms.lapq.pace import Pace, seconds_left
from qtool.algorithms.lapq.pnorm import P_VALUES, lp_error, parabola_minimum
from qtool.algorithms.lapq.records import LapqResult, LapqSpec, LapqState
from qtool.algorithms.lapq.search import lapq
from qtool.algorithms.lapq.tensors import (
    SearchedTensor,
    sample_outputs,
    searched_tensors,
    split,
    with_ranges,
)

__all__ = [
    "P_VALUES",
    "LapqResult",
    "LapqSpec",
    "LapqState",
    "Pace",
    "SearchedTensor",
    "lapq",
    "lp_error",
    "parabola_minimum",
    "sample_outputs",
    "searched_tensors",
    "seconds_left",
    "split",
    "with_ranges",
]
