"""A run's files land whole or not at all, in a folder of their own."""

import errno
import logging
import re
import time
from pathlib import Path

import pytest

from qtool.errors import OutputError
from qtool.run_dir import check_writable, log_to, make_run_dir, write_text, write_whole


def files_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def failing(error: BaseException):
    """A writer that fails half way."""

    def write(file) -> None:
        file.write(b"half")
        file.flush()
        raise error

    return write


def test_file_holds_what_was_written_and_nothing_lies_beside_it(tmp_path):
    path = write_text(tmp_path / "new" / "a.txt", "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert files_below(tmp_path) == [path]


def test_existing_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a longer text than the new one")
    write_text(path, "short")
    assert path.read_text() == "short"


def test_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = write_text(tmp_path / "a.txt", "a")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DISK_FULL, "cannot be written: No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:603] . \n unexpected pos"),
            "cannot be written; is the disk full? ([enf",
        ),
    ],
)
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error, message):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError) as caught:
        write_whole(path, failing(error))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)
    assert (files_below(tmp_path), path.read_text()) == ([path], "old")


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt()])
def test_other_errors_pass_and_leave_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write_whole(tmp_path / "a.txt", failing(error))
    assert files_below(tmp_path) == []


def test_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written: (Not a directory|File exists)"):
        write_text(tmp_path / "file" / "a.txt", "a")


def test_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder: cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "a")
    assert files_below(tmp_path) == []


# The folder


def test_a_place_that_cannot_be_written_is_found_out_before(tmp_path):
    check_writable(tmp_path / "new" / "file.json")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "it is a folder"), (tmp_path / "file" / "x", "no files can be made")):
        with pytest.raises(OutputError, match=message):
            check_writable(path)


def test_folder_is_named_after_the_time(tmp_path):
    path = make_run_dir(tmp_path / "logs")
    assert path.is_dir() and path.parent == tmp_path / "logs"
    assert re.fullmatch(r"\d{4}\.\d\d\.\d\d-\d{6}", path.name)


def test_name_of_the_run_comes_first(tmp_path):
    assert re.fullmatch(r"w4a8___\d{4}\.\d\d\.\d\d-\d{6}", make_run_dir(tmp_path, "w4a8").name)


def test_folders_of_the_same_second_are_numbered(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    assert [make_run_dir(tmp_path, "a").name for _ in range(3)] == ["a___now", "a___now-1", "a___now-2"]


@pytest.mark.parametrize("out_dir", ["file", "file/logs"])
def test_folder_below_a_file_is_refused(tmp_path, out_dir):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made: Not a directory; choose another folder"):
        make_run_dir(tmp_path / out_dir)


# The log


def test_log_holds_the_messages_of_the_block_only(tmp_path):
    logger = logging.getLogger("test_run_dir")
    with log_to(tmp_path / "run.log", logger):
        logger.warning("inside")
    logger.warning("outside")
    assert re.fullmatch(r"\S+ \S+ WARNING inside\n", (tmp_path / "run.log").read_text())


def test_log_is_detached_on_error(tmp_path):
    logger = logging.getLogger("test_run_dir")
    with pytest.raises(KeyError), log_to(tmp_path / "run.log", logger):
        raise KeyError
    assert logger.handlers == []


def test_log_that_cannot_be_written_is_refused(tmp_path):
    log = log_to(tmp_path, logging.getLogger("test_run_dir"))
    with pytest.raises(OutputError, match="cannot be written: Is a directory"), log:
        pytest.fail("the block ran")
