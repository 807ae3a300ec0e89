"""Batches do not depend on the worker processes, and what goes wrong in those is one line here."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from qtool.data.datasets import open_dataset
from qtool.data.loader import make_loader
from qtool.data.preprocessing import default_preprocessing
from qtool.errors import DataError

WORKERS = [0, 1, 3]


@pytest.fixture
def digits(plain):
    return open_dataset(None, None, preprocessing=plain)


@pytest.fixture
def damaged(write_images):
    """A folder of five images, of which the second and the third are truncated."""
    root = write_images(*(f"a/{i}.png" for i in range(5)))
    for i in (1, 2):
        path = root / f"a/{i}.png"
        path.write_bytes(path.read_bytes()[:60])
    return root


@pytest.mark.parametrize("workers", WORKERS)
def test_batches_follow_the_indices(digits, workers):
    indices = [5, 3, 400, 0, 7]
    loader = make_loader(digits, batch_size=2, workers=workers, indices=indices)
    batches = list(loader)
    assert (len(loader), loader.num_images) == (3, 5)
    assert [batch.indices.tolist() for batch in batches] == [[5, 3], [400, 0], [7]]
    assert torch.cat([batch.labels for batch in batches]).tolist() == digits.labels[indices].tolist()
    assert torch.equal(torch.cat([batch.images for batch in batches])[2], digits[400][0])


@pytest.mark.parametrize("workers", WORKERS)
def test_second_iteration_equals_the_first(digits, workers):
    loader = make_loader(digits, batch_size=200, workers=workers)
    first, second = list(loader), list(loader)
    assert sum(len(batch.labels) for batch in first) == len(digits)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


def test_workers_do_not_change_a_bit(shared_data):
    folder = shared_data / "imagenet-nips2017"
    dataset = open_dataset(folder, None, preprocessing=default_preprocessing("folder", None))
    results = [
        torch.cat([b.images for b in make_loader(dataset, batch_size=5, workers=n, indices=range(12))])
        for n in WORKERS
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("workers", WORKERS)
def test_global_state_is_left_alone(digits, workers):
    numbers = torch.get_rng_state()
    handler = signal.getsignal(signal.SIGINT)
    list(make_loader(digits, batch_size=300, workers=workers))
    assert torch.equal(numbers, torch.get_rng_state())
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_image_is_one_line(damaged, plain, workers):
    loader = make_loader(open_dataset(damaged, None, preprocessing=plain), batch_size=2, workers=workers)
    with pytest.raises(
        DataError,
        match=r"^[^\n]*a/1\.png: cannot be read: [^\n]*; replace the image or pass --skip-bad-images$",
    ):
        list(loader)


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_images_are_skipped_on_request(damaged, plain, workers):
    dataset = open_dataset(damaged, None, preprocessing=plain, skip_bad_images=True)
    loader = make_loader(dataset, batch_size=2, workers=workers)
    for _ in range(2):  # the count starts again with each iteration
        assert [batch.indices.tolist() for batch in loader] == [[0], [3], [4]]
        assert loader.bad_images == [dataset.path_of(1), dataset.path_of(2)]


@pytest.mark.parametrize("workers", WORKERS)
def test_only_bad_images_are_refused(damaged, plain, workers):
    dataset = open_dataset(damaged, None, preprocessing=plain, skip_bad_images=True)
    loader = make_loader(dataset, batch_size=1, workers=workers, indices=[1, 2])
    with pytest.raises(DataError, match=r": none of 2 images can be read; .*a/1\.png: cannot be read"):
        list(loader)


@pytest.mark.parametrize("workers", WORKERS)
def test_images_of_two_sizes_are_named(write_images, plain, workers):
    write_images("a/1.png", size=(8, 6))
    root = write_images("a/2.png", size=(9, 7))
    loader = make_loader(open_dataset(root, None, preprocessing=plain), batch_size=2, workers=workers)
    with pytest.raises(
        DataError,
        match=r"a/2\.png: is 9x7 after preprocessing, but .*a/1\.png is 8x6; make them equal with --crop$",
    ):
        list(loader)


def test_no_images_are_refused(digits):
    with pytest.raises(DataError, match=r"^digits test: no images$"):
        make_loader(digits, batch_size=1, workers=0, indices=[])


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (1, -1)])
def test_sizes_out_of_range_are_refused(digits, batch_size, workers):
    with pytest.raises(ValueError, match="must be at least"):
        make_loader(digits, batch_size=batch_size, workers=workers)


@pytest.mark.parametrize("batch_size", [2, 300])
def test_killed_worker_is_one_line(digits, monkeypatch, batch_size):
    image = digits.image

    def die(index):
        if index == 204 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(index)

    monkeypatch.setattr(digits, "image", die)
    with pytest.raises(DataError, match=r"^a process that reads images ended early \(SIGKILL\); if memory"):
        list(make_loader(digits, batch_size=batch_size, workers=2))


def test_worker_killed_while_it_sends_is_one_line(digits):
    """The results of large batches do not fit the pipe, so that a worker waits in the middle of one."""
    batches = iter(make_loader(digits, batch_size=200, workers=1))
    next(batches)
    [worker] = multiprocessing.active_children()
    time.sleep(0.3)
    worker.kill()
    with pytest.raises(DataError, match=r"ended early \(SIGKILL\)"):
        list(batches)


def test_process_that_cannot_be_started_is_one_line(digits, monkeypatch):
    def refuse(_process):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    with pytest.raises(DataError, match=r"no process can be started .* unavailable; use fewer --workers$"):
        list(make_loader(digits, batch_size=2, workers=2))


@pytest.mark.parametrize("workers", WORKERS)
def test_bug_in_a_dataset_stays_a_bug(digits, monkeypatch, workers):
    def fail(_index):
        raise RuntimeError("a bug")

    monkeypatch.setattr(digits, "image", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(make_loader(digits, batch_size=2, workers=workers))


def test_broken_off_iteration_ends_its_workers(digits):
    for _ in make_loader(digits, batch_size=1, workers=2):
        break
    assert not multiprocessing.active_children()


ENDLESS = """
from qtool.data.datasets import open_dataset
from qtool.data.loader import make_loader
from qtool.data.preprocessing import default_preprocessing
digits = open_dataset(None, None, preprocessing=default_preprocessing("digits", None))
try:
    while True:
        for batch in make_loader(digits, batch_size=100, workers=2):
            print("ready", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_interrupt_is_quiet():
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        output, errors = process.communicate(timeout=60)
    assert output.splitlines()[-1] == "stopped"
    assert errors == ""
    assert process.returncode == 0
