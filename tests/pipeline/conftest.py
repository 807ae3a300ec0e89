"""Statistics of a small network whose tensors are made up, as calibration files them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.observers.fingerprint import Fingerprint
from qtool.observers.rows import as_rows
from qtool.observers.stats import ActivationStats, LayerStats, ModelStats
from qtool.observers.tensor import Chunk, TensorObserver
from qtool.pipeline.stats_files import save_stats

FINGERPRINT = Fingerprint(((3, 4, 4),), "names", "sizes", "weights", {"crop": 224, "mean": (0.5, 0.5, 0.5)})


def observed(x: Tensor) -> ActivationStats:
    """The record of (N, ...) values, four images at a time."""
    observer = TensorObserver((1, *x.shape[1:]))
    for number, part in enumerate(x.split(4)):
        rows = as_rows(part, len(part), 0, 1)
        observer.update(rows, Chunk(number, 4 * number, len(part)))
    return observer.sums().stats()


def _images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def _network_stats(x: Tensor) -> ModelStats:
    """conv1, relu and fc on images x: relu's output is fc's input in another shape."""
    conv = 2 * x + 1
    record, conv_record, relu_record = observed(x), observed(conv), observed(conv.relu())
    flat = replace(relu_record, shape=(1, 48), channel_min=None, channel_max=None)
    layers = {
        "conv1": LayerStats({0: record}, conv_record),
        "relu": LayerStats({0: conv_record}, relu_record),
        "fc": LayerStats({0: flat}, observed(conv.relu().flatten(1)[:, :10] - 3)),
    }
    return ModelStats(layers, "this calibration", FINGERPRINT)


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """So many seeded images, (N, 3, 4, 4): images(8, seed=1)."""
    return _images


@pytest.fixture
def network_stats() -> Callable[[Tensor], ModelStats]:
    """The statistics of a network on images."""
    return _network_stats


@pytest.fixture
def write_stats(tmp_path) -> Callable[..., Path]:
    """Write statistics to NAME.yaml, those of some images or given ones: its path."""

    def write(name: str, stats: ModelStats | Tensor) -> Path:
        measured = _network_stats(stats) if isinstance(stats, Tensor) else stats
        return save_stats(measured, tmp_path / f"{name}.yaml")

    return write
