"""Quantization-aware training with learned step sizes.

    function.py    rounding to a grid, with the gradients of LSQ
    weights.py     a layer's weight and bias, and the scale of their grid
    grids.py       grids of activations: learned steps, or ranges that follow what is seen
    network.py     a whole network of them, from a plan and back to one
    loss.py        distance to the float network's predictions, and to labels
    train.py       the steps of training

Reference:
    Esser et al. 2020, arXiv:1902.08153 (LSQ).
"""

from qtool.algorithms.lsq.network import TrainedNetwork, why_not
from qtool.algorithms.lsq.train import DivergedError, FinetuneSettings, Trainer

__all__ = ["DivergedError", "FinetuneSettings", "TrainedNetwork", "Trainer", "why_not"]
