"""Calls in threads: their order, their share of torch's threads, and their errors."""

import threading

import pytest
import torch

from qtool.pipeline.threads import run_in_threads


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_calls_run_at_once_each_with_a_share_of_the_threads(four_threads):
    both, shares = threading.Barrier(2, timeout=30), []

    def work(number: int) -> None:
        both.wait()  # returns only when two calls are here
        shares.append((number, torch.get_num_threads()))

    run_in_threads(work, ((i,) for i in range(6)), most=2)
    assert sorted(shares) == [(i, 2) for i in range(6)]
    assert torch.get_num_threads() == 4


def test_arguments_are_taken_as_they_are_needed(four_threads):
    taken, done = [], []

    def arguments():
        for number in range(9):
            taken.append(number)
            assert number - len(done) <= 3
            yield (number,)

    run_in_threads(done.append, arguments(), most=3)
    assert sorted(done) == taken == list(range(9))


def test_the_first_error_in_the_order_of_the_arguments_is_raised(four_threads):
    late = threading.Event()

    def work(number: int) -> None:
        if number == 1:
            late.wait(30)
            raise ValueError("of call 1")
        if number == 2:
            late.set()
            raise ValueError("of call 2")

    with pytest.raises(ValueError, match="of call 1"):
        run_in_threads(work, ((i,) for i in range(5)), most=3)
    assert torch.get_num_threads() == 4


def test_one_at_a_time_runs_in_the_callers_thread(four_threads):
    found = []
    run_in_threads(lambda _: found.append(threading.current_thread()), [(1,), (2,)], most=1)
    assert found == [threading.current_thread()] * 2
