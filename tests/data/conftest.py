"""Small image folders, and the preprocessing that leaves their pixels as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtool.data.preprocessing import Preprocessing


@pytest.fixture
def plain() -> Preprocessing:
    """No resize, no crop, pixels in [0, 1]."""
    return Preprocessing(None, None, (0.0,), (1.0,))


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes images, each one noise of its own, below tmp_path and returns tmp_path."""

    def write(*names: str, size: tuple[int, int] = (8, 8)) -> Path:
        random = np.random.RandomState(len(names))
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        return tmp_path

    return write
