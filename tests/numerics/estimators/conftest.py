"""The tensors that the published thresholds are of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from qtool.numerics.affine import fake_quantize, qparams_from_range
from qtool.numerics.spec import QuantSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "calibrators.yaml"


@pytest.fixture(scope="session")
def published() -> dict[str, dict[str, float]]:
    """Thresholds by calibrator and tensor."""
    found: dict[str, dict[str, float]] = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def samples() -> dict[str, Tensor]:
    """The tensors, by the names that the golden file gives them."""
    gauss = torch.from_numpy(np.random.default_rng(0).standard_normal(200000).astype(np.float32))
    laplace = torch.from_numpy(np.random.default_rng(1).laplace(size=200000))
    with_50, with_30 = gauss.clone(), gauss.relu()
    with_50[0], with_30[1] = 50, 30
    return {"G": gauss, "G50": with_50, "R": gauss.relu(), "R30": with_30, "Lp": laplace}


@pytest.fixture(scope="session")
def squared_error() -> Callable[[Tensor, Any, Any, QuantSpec], float]:
    """The error that a tensor really has on the grid over a range."""

    def of(x: Tensor, low: Any, high: Any, spec: QuantSpec) -> float:
        limits = (torch.tensor(float(v)) for v in (low, high))
        return float(
            (fake_quantize(x.float(), qparams_from_range(*limits, spec)) - x).double().square().sum()
        )

    return of
