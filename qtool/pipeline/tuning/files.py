"""What trials start from as files: they lie in the history, and travel to other processes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from qtool.observers.files import read_stats
from qtool.observers.stats import ModelStats
from qtool.pipeline import steps
from qtool.pipeline.stats_files import STATS_FILE, histograms_path, save_stats
from qtool.report import Result

FLOAT_FILE = "float_outputs.npz"


def pack(stats: ModelStats, float_result: Result) -> dict[str, bytes]:
    """Statistics and float outputs as files, from which a bench elsewhere is made."""
    with TemporaryDirectory() as folder:
        path = save_stats(stats, Path(folder) / STATS_FILE)
        paths = [path, *(p for p in [histograms_path(path)] if p.exists())]
        files = {p.name: p.read_bytes() for p in paths}
    content = io.BytesIO()
    assert float_result.indices is not None
    np.savez_compressed(
        content,
        logits=float_result.logits.numpy(),
        labels=float_result.labels.numpy(),
        indices=float_result.indices.numpy(),
        seconds=float_result.seconds,
    )
    return files | {FLOAT_FILE: content.getvalue()}


def unpack(files: Mapping[str, bytes]) -> tuple[ModelStats, Result]:
    """What pack was given."""
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        stats = read_stats(Path(folder) / STATS_FILE)
    with np.load(io.BytesIO(files[FLOAT_FILE])) as arrays:
        labels, logits, indices = (torch.from_numpy(arrays[n]) for n in ("labels", "logits", "indices"))
        return stats, steps.summarize(labels, logits, float(arrays["seconds"]), indices)
