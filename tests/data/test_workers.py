"""Results come in the order of the items, whole, however large they are."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qtool.data.pipes import receive, send
from qtool.data.workers import ordered_map
from qtool.errors import DataError


def slow_at_first(item):
    time.sleep(0.2 if item == 0 else 0)
    return item, os.getpid()


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 1), (2, 2), (9, 5)])
def test_order_is_that_of_the_items(workers, processes):
    results = list(ordered_map(slow_at_first, range(5), workers))
    assert [item for item, _ in results] == [0, 1, 2, 3, 4]
    assert len({process for _, process in results}) == processes


def test_no_items_give_no_results():
    assert list(ordered_map(slow_at_first, [], 2)) == []


def test_workers_can_be_started_from_any_thread():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: list(ordered_map(abs, [-1, 2], 2))).result() == [1, 2]


def test_large_arrays_arrive_whole_and_writable():
    arrays = [np.arange(300_000, dtype=np.float32) * n for n in range(3)]
    for expected, received in zip(arrays, ordered_map(arrays.__getitem__, range(3), 2), strict=True):
        assert np.array_equal(received, expected)
        received += 1


def test_array_cut_in_the_middle_is_an_end_of_file():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    send(sender, np.zeros(1000))
    whole = os.read(receiver.fileno(), 65536)
    os.write(sender.fileno(), whole[:-1])
    sender.close()
    with pytest.raises(EOFError):
        receive(receiver)


def test_exit_code_is_told():
    with pytest.raises(DataError, match=r"ended early \(exit code 3\)"):
        list(ordered_map(os._exit, [3], 1))
