"""Writing statistics: the YAML, and the file of histograms beside it."""

from __future__ import annotations

from pathlib import Path

from qtool.observers.files import file_contents
from qtool.observers.stats import ModelStats
from qtool.run_dir import write_text, write_whole

STATS_FILE = "acts_quantization_stats.yaml"
HISTOGRAMS_FILE = "acts_histograms.npz"


def save_stats(stats: ModelStats, path: Path) -> Path:
    """Write a stats YAML, after its file of histograms: `acts_histograms.npz` for the name that runs use.

    Raises:
        OutputError: if one of them cannot be written.
    """
    beside = histograms_path(path)
    text, content = file_contents(stats, beside.name)
    if content is not None:
        whole = content
        write_whole(beside, lambda file: file.write(whole))
    return write_text(path, text)


def histograms_path(path: Path) -> Path:
    """Where save_stats puts the histograms of a stats YAML."""
    beside = HISTOGRAMS_FILE if path.name == STATS_FILE else f"{path.stem}_histograms.npz"
    return path.parent / beside
