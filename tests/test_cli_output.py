"""Runs that cannot write, or that Ctrl-C ends: one line, and no file that is not whole."""

import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qtool.errors import OutputError
from qtool.run_dir import log_to

QUICK = ("--effective-test-size", "0.05", "--calib-samples", "8", "--workers", "0")
COMMAND = (sys.executable, "-m", "qtool")
UNFINISHED = "interrupted: files that were not finished have not been written\n"


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """Longer files cannot be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


@pytest.fixture
def refused(run_cli):
    """Run a command that cannot write, and give its last line."""

    def run(*args: object) -> str:
        result = run_cli(*args)
        assert (result.exit_code, result.stdout) == (1, "")
        return result.stderr.splitlines()[-1]

    return run


@pytest.mark.parametrize("out_dir", ["/dev/full/x", "file", "file/x"])
def test_output_folder_that_cannot_be_made(out_dir, refused):
    Path("file").write_text("mine")
    message = refused("quantize", *QUICK, "-o", out_dir)
    assert message.startswith(f"error: {out_dir}/")
    assert message.endswith("cannot be made: Not a directory; choose another folder with --out-dir")
    assert files_below(Path()) == {"file"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "--save-predictions: . is a folder; name a file in it"),
        ("/dev/full/x.npz", "/dev/full/x.npz: cannot be written: no files can be made in /dev/full; choose"),
    ],
)
def test_predictions_that_cannot_be_written_are_found_out_first(path, message, refused):
    assert refused("quantize", *QUICK, "--save-predictions", path).startswith(f"error: {message}")
    assert not files_below(Path())


@pytest.mark.parametrize(
    ("size_bytes", "flags", "first_too_long"),
    [
        (500, QUICK, "config.yaml"),
        (4000, QUICK, "acts_histograms.npz"),
        (20_000, ("--qe-dynamic", "--effective-test-size", "0.05"), "quantized_checkpoint.pth.tar"),
    ],
)
def test_full_disk_leaves_whole_files_only(size_bytes, flags, first_too_long, refused):
    with files_limited_to(size_bytes):
        message = refused("quantize", *flags)
    assert message.startswith("error: logs/")
    # torch's own writer words it in another way.
    assert f"/{first_too_long}: cannot be written" in message and (
        "File too large" in message or "full" in message
    )
    assert not {first_too_long, "results.json"} & files_below(Path())
    assert not [name for name in files_below(Path()) if name.startswith(".")]


def test_full_disk_keeps_the_earlier_predictions(refused, monkeypatch):
    # Larger than the other files of the run, so that there is room for these alone.
    monkeypatch.setattr(np, "savez_compressed", np.savez)
    Path("p.npz").write_bytes(b"of an earlier run")
    with files_limited_to(8000):
        message = refused("evaluate", "-j", "0", "--save-predictions", "p.npz")
    assert message == "error: p.npz: cannot be written: File too large"
    assert Path("p.npz").read_bytes() == b"of an earlier run"
    assert files_below(Path()) == {"p.npz"}


@pytest.mark.parametrize("args", [("layers",), ("quantize", "--help")])
def test_full_stdout_is_one_line(args):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, *args], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: stdout: No space left on device"
    assert "Traceback" not in done.stderr


def test_log_on_a_full_disk_is_one_error():
    logger = logging.Logger("full")
    message = r"^/dev/full: cannot be written: No space left on device$"
    with pytest.raises(OutputError, match=message), log_to(Path("/dev/full"), logger):
        logger.info("a message")


@pytest.mark.parametrize(
    "text", ["DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", "bug"]
)
def test_lack_of_memory_is_one_line_and_a_bug_is_not(text, run_cli, monkeypatch):
    def fail(_config, _ranks):
        raise RuntimeError(text)

    monkeypatch.setattr("qtool.pipeline.runs.evaluate", fail)
    result = run_cli("evaluate")
    out_of_memory = result.stderr == "error: out of memory; try a smaller --batch-size\n"
    assert out_of_memory == ("memory" in text)
    assert isinstance(result.exception, RuntimeError) != out_of_memory


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_calibration_leaves_nothing_behind(workers, tmp_path):
    predictions = tmp_path / "p.npz"
    predictions.write_bytes(b"of an earlier run")
    options = ("--fraction", "1", "-b", "1", "-j", str(workers), "--save-predictions", "p.npz")
    with subprocess.Popen(
        [*COMMAND, "quantize", *options], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        for line in process.stderr:
            if line.startswith("calibrating on 537 "):
                break
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
        stdout, rest = process.communicate(timeout=60)
    assert (process.returncode, stdout, rest) == (1, "", UNFINISHED)
    assert files_below(tmp_path) == {"p.npz"}
    assert not list(tmp_path.glob("logs/*"))
    assert predictions.read_bytes() == b"of an earlier run"
    with pytest.raises(ProcessLookupError):  # no worker lives on
        os.killpg(process.pid, 0)


def test_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    script = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from qtool.cli import main
main(["quantize"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", UNFINISHED)
