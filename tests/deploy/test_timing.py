"""What is measured of networks side by side."""

import time

import pytest
import torch

from qtool.deploy.timing import LEAST_ROUNDS, WARM_UP, Timing, added_memory_mib, time_in_turns


def test_networks_take_turns_and_the_slow_one_is_slower():
    order = []

    def fast(x):
        order.append("fast")

    def slow(x):
        order.append("slow")
        time.sleep(0.005)

    found = time_in_turns({"fast": fast, "slow": slow}, torch.zeros(4, 1), seconds=0)
    assert order == ["fast", "slow"] * (WARM_UP + LEAST_ROUNDS)
    assert found["slow"].median_ms >= 5 > found["fast"].median_ms
    assert found["slow"].images_per_second <= 4 / 0.005


def test_nine_of_ten_rounds_stay_below_the_ninetieth_percentile():
    timing = Timing(1, tuple(number / 1000 for number in range(11)))
    assert timing.median_ms == pytest.approx(5) and timing.p90_ms == pytest.approx(9)
    assert Timing(2, (0.5,)).p90_ms == 500


def test_memory_that_a_pass_takes_is_counted():
    def takes(mib):
        return lambda x: torch.ones(mib << 18).sum()

    large = added_memory_mib(takes(256), torch.zeros(1))
    if large is None:
        pytest.skip("the system does not tell the peak of memory")
    assert 200 <= large <= 400
    assert added_memory_mib(takes(1), torch.zeros(1)) <= 64
