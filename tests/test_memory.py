import ctypes
import subprocess
import sys

import pytest

import qtool
from qtool import memory

# Each block is made, filled and freed; how often a page was touched for the first time meanwhile.
COUNT_FAULTS = """
import resource, sys
from qtool.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
bytearray(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(16 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults(word: str, program: str = COUNT_FAULTS) -> tuple[bool, int]:
    command = [sys.executable, "-c", program, word]
    kept, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not has_glibc(), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults():
    given_back, kept = faults("leave"), faults("keep")
    assert not given_back[0] and kept[0]
    assert kept[1] < given_back[1] / 10


# A thread allocates 80 MB again and again, more than the heaps hold that glibc gives to threads.
IN_A_THREAD = COUNT_FAULTS.replace("bytearray(16 << 20)", "bytearray(80 << 20)").replace(
    "print(", "import threading\ndef work():\n    for _ in range(5): bytearray(80 << 20)\nwork()\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
    "thread = threading.Thread(target=work); thread.start(); thread.join()\nprint("
)  # fmt: skip


@pytest.mark.skipif(not has_glibc(), reason="glibc only")
def test_threads_too_use_freed_memory_again():
    assert faults("keep", IN_A_THREAD)[1] < faults("leave", IN_A_THREAD)[1] / 10


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())
    assert memory.keep_freed_memory() is False
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False


def test_it_is_offered_in_python():
    assert qtool.keep_freed_memory is memory.keep_freed_memory


@pytest.mark.parametrize(
    "command", ["evaluate", "calibrate", "quantize", "layers", "search-clipping", "check"]
)
def test_commands_keep_freed_memory_unless_told_otherwise(command, run_cli, monkeypatch):
    asked = []
    monkeypatch.setattr("qtool.cli.keep_freed_memory", lambda: asked.append(command))
    # Each ends at a file or network that does not exist, before any work.
    absent = ["gate.yaml"] if command == "check" else ["-a", "no_such_network"]
    assert run_cli(command, *absent).exit_code == 1
    assert asked == [command]
    if command == "layers":
        return  # of the section `run` it has no flags
    assert run_cli(command, *absent, "--release-memory").exit_code == 1
    assert asked == [command]
