"""Several workers: results in order, whoever dies on the way."""

import importlib
import os
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from qtool.errors import ConfigError, DataError, WorkerError
from qtool.search.workers import RayCrew


@pytest.fixture
def tasks(monkeypatch):
    """The module tasks.py, under a name that workers can import too."""
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)  # Ray's processes do not have our sys.path
    return importlib.import_module("tasks")


def test_results_come_in_the_order_of_the_tasks(tasks, pool_of):
    assert list(pool_of(tasks.squares).run(range(8))) == [x * x for x in range(8)]


def test_a_pool_serves_batch_after_batch_and_one_inside_another(tasks, pool_of):
    pool = pool_of(tasks.squares)
    with closing(pool.run([0, 1, 2, 3])) as outer:
        assert next(outer) == 0
        assert list(pool.run([5])) == [25]
        assert list(outer) == [1, 4, 9]


def test_a_task_whose_worker_died_is_done_again(tasks, pool_of, tmp_path):
    pool = pool_of(partial(tasks.mortal, tmp_path, 2))
    names = ["a", "deadly", "b", "c"]
    assert list(pool.run(names)) == [f"{name} done" for name in names]
    assert (tmp_path / "deadly").read_text() == "xx"


def test_a_task_that_kills_every_worker_ends_it_in_one_line(tasks, pool_of, tmp_path):
    pool = pool_of(partial(tasks.mortal, tmp_path, 99))
    with pytest.raises(WorkerError, match="one died 3 times over the same trial") as error:
        list(pool.run(["deadly"]))
    assert "\n" not in str(error.value)
    assert list(pool.run(["a"])) == ["a done"]


def test_what_the_user_can_fix_is_said_as_it_is(tasks, pool_of):
    with pytest.raises(DataError, match=r"images/1\.png: unreadable"):
        list(pool_of(tasks.failing).run(["a", "user"]))


def test_a_bug_comes_with_its_traceback(tasks, pool_of):
    with pytest.raises(RuntimeError, match="KeyError: 'gone'"):
        list(pool_of(tasks.failing).run(["bug"]))


def test_what_is_behind_the_end_is_stopped(tasks, pool_of, tmp_path):
    pool = pool_of(partial(tasks.mortal, tmp_path, 0))
    with closing(pool.run(["a", "b", "c"])) as results:
        assert next(results) == "a done"
    assert list(pool.run(["d"])) == ["d done"]


def test_without_ray_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray.*pip install 'qtool\[ray\]'"):
        RayCrew(None, list)
