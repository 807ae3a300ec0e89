import torch
from torch import nn

from qtool.deploy.native.containers import Container
from qtool.deploy.native.exhaustive import same_joined, same_pairs
from qtool.deploy.native.kernels import Add, Cat

A, B, OUTPUT = Container(1.0, 3, 255), Container(0.5, 100, 200), Container(1.0, 0, 255)


class Sum(nn.Module):
    """The simulation's, with ratios of its own."""

    def __init__(self, ratio):
        super().__init__()
        self.ratio = ratio

    def forward(self, a, b):
        return (a + torch.round(b * self.ratio)).clamp(0, 255)


def test_a_sum_is_tried_on_every_pair_of_integers():
    native = Add([1.0, 0.7071], (None, None), OUTPUT)
    assert same_pairs(Sum(0.7071), native, (A, B), OUTPUT)
    # Few of 201 integers go to others.
    assert not same_pairs(Sum(0.7121), native, (A, B), OUTPUT)


def test_a_sum_whose_inputs_meet_ties_is_found_out():
    assert not same_pairs(Sum(0.5), Add([1.0, 0.5], (None, None), OUTPUT), (A, B), OUTPUT)


def test_joined_tensors_are_tried_on_every_integer_of_each():
    def joined(ratio):
        return lambda tensors, dim: torch.cat([tensors[0], torch.round(tensors[1] * ratio)], dim).clamp(
            0, 255
        )

    native = Cat([1.0, 0.7071], OUTPUT)
    assert same_joined(joined(0.7071), native, (A, B), OUTPUT)
    assert not same_joined(joined(0.7121), native, (A, B), OUTPUT)
