"""The file of histograms that Distiller's --activation-histograms writes, made from qtool's own.

Distiller passes the images a second time and counts every element. qtool has counted a sample of each
image's elements in the one pass there is; these counts are split evenly inside a bin and scaled to the
number of elements. A bin is at most as wide as one of Distiller's, unless a tensor's values are some 2,000
times as large as its range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.observers.stats import ActivationStats, ModelStats
from qtool.run_dir import write_whole

DISTILLER_HISTOGRAMS_FILE = "acts_histograms.pt"
BINS = 2048


def save_histograms(stats: ModelStats, path: Path) -> Path:
    """Write Distiller's file, which torch.load reads with weights_only=True.

    Layer name -> `inputs` (0, 1, ...) and `output`, each with `hist` and `bin_centroids`, see histogram.

    Raises:
        OutputError: if it cannot be written.
    """
    known: dict[int, dict[str, Tensor]] = {}

    def once(record: ActivationStats | None) -> dict[str, Tensor] | None:
        """A tensor under several names has one entry, which torch.save stores once."""
        if record is None or record.histogram is None:
            return None
        key = id(record.histogram)
        if key not in known:
            known[key] = histogram(record)
        return known[key]

    tree: dict[str, dict[str, Any]] = {}
    for name, layer in stats.layers.items():
        inputs = {i: once(record) for i, record in layer.inputs.items()}
        tree[name] = {"inputs": {i: found for i, found in inputs.items() if found is not None}}
        output = once(layer.output)
        if output is not None:
            tree[name]["output"] = output
    return write_whole(path, lambda file: torch.save(tree, file))


def histogram(record: ActivationStats) -> dict[str, Tensor]:
    """A record's histogram in Distiller's form.

    Returns:
        `hist`, (2048,) float32: how many elements lie in each of as many equal bins over [min, max];
        `bin_centroids`, (2048,) float32, units of the tensor: their middles. All elements of a constant
        tensor are in the middle bin.

    Raises:
        ValueError: if the record has no histogram.
    """
    found = record.histogram
    if found is None:
        raise ValueError("a record without histogram has none in Distiller's form")
    counts = found.rebinned(record.min, record.max, BINS)
    if record.total_numel is not None:
        counts *= record.total_numel / found.total
    half = (record.max - record.min) / BINS / 2
    return {
        "hist": torch.from_numpy(counts).to(torch.float32),
        "bin_centroids": torch.linspace(
            record.min + half, record.max - half, BINS, dtype=torch.float64
        ).float(),
    }
