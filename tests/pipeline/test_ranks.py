"""Runs of several processes: the files of one process, and a clear end when one of them fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATS, HISTOGRAMS = "acts_quantization_stats.yaml", "acts_histograms.npz"
# torchrun gives each process one thread; sums of more threads have another order.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(processes: int, *args: object) -> subprocess.CompletedProcess:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, "-m", "qtool", *map(str, args)]
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)


def folder_of(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1])
    return path if path.is_dir() else path.parent


@pytest.mark.parametrize("processes", [2, 3])
def test_calibration_gives_the_bytes_of_one_process(processes, chdir_tmp):
    args = ("calibrate", "--calib-samples", "300", "-j", "0")
    one, several = (folder_of(launch(n, *args, "-o", f"of{n}")) for n in (1, processes))
    for name in (STATS, HISTOGRAMS):
        assert (one / name).read_bytes() == (several / name).read_bytes()
    assert len(list(Path(f"of{processes}").iterdir())) == 1  # the first process alone has a folder


@pytest.mark.slow
def test_quantization_gives_the_results_of_one_process(chdir_tmp):
    args = ("quantize", "--calib-samples", "300", "-b", "60", "-j", "0", "--save-predictions", "p.npz")
    records = []
    for processes in (1, 2):
        done = launch(processes, *args, "-o", f"of{processes}")
        record = json.loads((folder_of(done) / "results.json").read_text())
        assert done.stdout.count("agreement") == 1
        records.append(record)
    for record in records:
        for network in ("float", "quantized"):
            del record[network]["images_per_second"]
    assert records[0] == records[1]


def test_a_bad_image_in_one_share_ends_the_run_with_its_name_and_no_files(chdir_tmp):
    import numpy as np
    from PIL import Image

    for index in range(300):
        path = Path("images", f"c{index % 10}", f"{index:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), index % 255, dtype=np.uint8)).save(path)
    bad = Path("images/c9/299.png")
    bad.write_bytes(b"no image")
    done = launch(
        2, "calibrate", "-a", "digits_resnet", "images", "--fraction", "1.0", "-j", "0", "-o", "out"
    )
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if "299.png" in line]
    assert said.startswith("error: process ") and "of 2: " in said
    assert not list(Path("out").rglob("*.yaml")) and not list(Path("out").rglob("*.npz"))


@pytest.mark.parametrize("command", ["check", "layers"])
def test_commands_without_images_to_share_run_in_one_process(command, run_cli, monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    gate = tmp_path / "g.yaml"
    gate.write_text("{}")
    done = run_cli(command, *([str(gate)] if command == "check" else []))
    assert done.exit_code == 1
    assert f"error: qtool {command}: runs in one process; start it without torchrun" in done.stderr


def test_half_of_torchruns_environment_is_refused(run_cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_cli("calibrate", "--calib-samples", "4")
    assert done.exit_code == 1
    assert "WORLD_SIZE=2 in the environment, without the rest of what torchrun sets" in done.stderr
