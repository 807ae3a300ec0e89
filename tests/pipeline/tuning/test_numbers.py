"""What is told of evaluations, and what travels to other processes."""

import pytest
import torch

import qtool
from qtool.observers.stats import ModelStats
from qtool.pipeline.steps import summarize
from qtool.pipeline.tuning.files import pack, unpack
from qtool.pipeline.tuning.numbers import numbers, relative_errors, rows_of


def result(logits: list[list[float]], labels: list[int], indices: list[int]):
    return summarize(torch.tensor(labels), torch.tensor(logits), 2.0, torch.tensor(indices))


FLOAT = result([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 1, 1], [4, 7, 9])
OTHER = result([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]], [0, 1, 1], [4, 7, 9])


def test_the_error_of_an_image_is_relative_to_its_own_logits():
    assert relative_errors(FLOAT.logits, OTHER.logits).tolist() == pytest.approx([0.25, 0.0, 5.0])


def test_the_worst_images_are_told_by_their_numbers_in_the_dataset():
    found = numbers(FLOAT, OTHER, worst=2)
    assert found["worst"] == [4, 9]
    assert found["top1"] == 100.0 and found["top1_difference"] == pytest.approx(100 / 3, rel=1e-5)
    assert found["agreement"] == pytest.approx(200 / 3)


def test_rows_are_found_by_the_numbers_of_images():
    part = rows_of(FLOAT, [9, 4])
    assert part.labels.tolist() == [1, 0] and part.images == 2 and part.top1 == 50.0
    assert part.images_per_second == pytest.approx(FLOAT.images_per_second)


def test_statistics_and_float_outputs_travel_as_files(tiny_net, tiny_batches):
    stats = qtool.calibrate(tiny_net, tiny_batches)
    again, float_result = unpack(pack(stats, FLOAT))
    assert isinstance(again, ModelStats) and again.layers.keys() == stats.layers.keys()
    assert torch.equal(float_result.logits, FLOAT.logits) and torch.equal(float_result.indices, FLOAT.indices)
    one, other = qtool.quantize(tiny_net, stats), qtool.quantize(tiny_net, again)
    assert torch.equal(one(tiny_batches[0]), other(tiny_batches[0]))
