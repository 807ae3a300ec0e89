"""The numbers of a comparison, by hand, and the table that shows them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from qtool.report import Result, compare, table

LABELS = torch.tensor([0, 1, 1, 0])
# Float: the first three right. Quantized: the first and the last right, half of the predictions equal.
FLOAT = Result(
    top1=75.0,
    top5=100.0,
    loss=0.5,
    images=4,
    seconds=2.0,
    labels=LABELS,
    predictions=torch.tensor([0, 1, 1, 1]),
    logits=torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 3.0], [0.0, 3.0]]),
)
QUANTIZED = replace(
    FLOAT,
    top1=50.0,
    top5=99.5,
    loss=0.75,
    seconds=4.0,
    predictions=torch.tensor([0, 0, 1, 0]),
    logits=FLOAT.logits + torch.tensor([0.3, 0.0]),
)


def test_comparison_is_that_worked_by_hand():
    quantized = replace(QUANTIZED, predictions=torch.tensor([0, 0, 0, 0]))
    found = compare(FLOAT, quantized)
    assert found.top1_difference == -25.0
    # Right changes by 0, -1, -1, 1: mean -1/4, squares 3, so variance (3 - 4/16) / 3 = 11/12.
    assert found.top1_standard_error == pytest.approx(100 * math.sqrt(11 / 12 / 4))
    assert found.agreement == 25.0
    assert found.logit_sqnr_db == pytest.approx(20.0, abs=1e-5)  # 4 x 9 over 4 x 0.09; 0.3 is float32


def test_network_compared_with_itself_differs_in_nothing():
    found = compare(FLOAT, FLOAT)
    assert found.as_dict() == {
        "top1_difference": 0.0,
        "top1_standard_error": 0.0,
        "agreement": 100.0,
        "logit_sqnr_db": math.inf,
    }


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1])])
def test_results_of_different_images_are_refused(labels):
    with pytest.raises(ValueError, match="the two results are of different images"):
        compare(FLOAT, replace(QUANTIZED, labels=labels))


def test_table_shows_both_networks_and_how_they_differ():
    shown = table({"float": FLOAT, "quantized": QUANTIZED}, compare(FLOAT, QUANTIZED))
    # Right changes by 0, -1, 0, 1: variance 2/3 over 4 images.
    assert shown.splitlines() == [
        "               top-1    top-5     loss  images  images/s",
        "float         75.000  100.000   0.5000       4       2.0",
        "quantized     50.000   99.500   0.7500       4       1.0",
        "difference   -25.000  points of top-1, standard error 40.825 on paired images",
        "agreement     50.000  % of predictions equal; logits SQNR 20.0 dB",
    ]


def test_table_of_one_network_has_no_difference():
    assert len(table({"float": FLOAT}).splitlines()) == 2


def test_numbers_of_a_result_fit_into_json():
    assert json.loads(json.dumps(FLOAT.as_dict())) == {
        "top1": 75.0,
        "top5": 100.0,
        "loss": 0.5,
        "images": 4,
        "images_per_second": 2.0,
    }


def test_no_time_at_all_is_no_division_by_zero():
    assert replace(FLOAT, seconds=0.0).images_per_second == math.inf
