"""A run that ends early leaves a folder only if it holds something of use, and then says where."""

import logging
import shutil
from pathlib import Path

import pytest

from qtool.config import load_config
from qtool.pipeline.run_folder import run_folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_run_that_has_written_nothing_leaves_no_folder(error, tmp_path, caplog):
    with (
        caplog.at_level(logging.DEBUG, "qtool"),
        pytest.raises(error),
        run_folder(load_config(out_dir=tmp_path)),
    ):
        raise error
    assert not list(tmp_path.iterdir())
    assert not [message for message in caplog.messages if "ended early" in message]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_run_that_has_written_something_keeps_all_of_it_and_says_where(error, tmp_path, caplog):
    with (
        caplog.at_level(logging.DEBUG, "qtool"),
        pytest.raises(error),
        run_folder(load_config(out_dir=tmp_path)) as run,
    ):
        Path(run, "stats.yaml").write_text("a: 1")
        raise error("why")
    assert {path.name for path in run.iterdir()} == {"stats.yaml", "config.yaml", f"{run.name}.log"}
    assert f"ended by {error.__name__}: why" in (run / f"{run.name}.log").read_text()
    assert caplog.messages[-1] == f"ended early; what was written until then is in {run}"


def test_folder_that_has_gone_does_not_hide_the_error(tmp_path):
    with pytest.raises(ValueError, match="why"), run_folder(load_config(out_dir=tmp_path)) as run:
        shutil.rmtree(run)
        raise ValueError("why")


def test_run_that_ends_well_keeps_its_folder(tmp_path):
    with run_folder(load_config(out_dir=tmp_path)) as run:
        pass
    assert {path.name for path in run.iterdir()} == {"config.yaml", f"{run.name}.log"}
