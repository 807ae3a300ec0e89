"""Make the files of tests/golden that come from another implementation.

    python scripts/make_golden.py

fake_quantize.json: grids from torch's observers, and integers from its fake_quantize. aciq.json: the
clipping constants, from solving ACIQ's equations with SciPy. The other golden files are worked by hand.
"""

import json
import math
import warnings
from pathlib import Path

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

# Distiller's mode name -> whether symmetric, type of the integers, their limits at b bits
MODES = {
    "sym": (True, torch.qint8, lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1)),
    "sym_restr": (True, torch.qint8, lambda b: (1 - 2 ** (b - 1), 2 ** (b - 1) - 1)),
    "asym_s": (False, torch.qint8, lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1)),
    "asym_u": (False, torch.quint8, lambda b: (0, 2**b - 1)),
}


def main() -> None:
    warnings.simplefilter("ignore")  # torch.ao announces its successor
    cases = [fake_quantize_case(mode, bits, axis) for mode in MODES for bits in (4, 8) for axis in (None, 0)]
    write(
        "fake_quantize.json",
        "torch.ao.quantization's observers on 0.9 x, and torch.fake_quantize_*_affine on x",
        {"cases": cases},
    )
    write(
        "aciq.json",
        "roots of the derivative of ACIQ's error (arXiv:1810.05723) for a spread of 1, by SciPy",
        {"laplace": constants(laplace_slope), "gauss": constants(gauss_slope)},
    )


def fake_quantize_case(mode: str, bits: int, axis: int | None) -> dict[str, object]:
    """Two rows of x, about a tenth of it outside the range, and what torch makes of them."""
    symmetric, dtype, limits = MODES[mode]
    low, high = limits(bits)
    x = 2 * torch.randn(2, 5, generator=torch.Generator().manual_seed(bits)) + torch.tensor([[0.5], [-1.0]])
    scheme = f"per_{'tensor' if axis is None else 'channel'}_{'symmetric' if symmetric else 'affine'}"
    observer = (MinMaxObserver if axis is None else PerChannelMinMaxObserver)(
        dtype=dtype, qscheme=getattr(torch, scheme), quant_min=low, quant_max=high
    )
    observer(0.9 * x)
    scale, zero_point = observer.calculate_qparams()
    steps = x / column(scale)
    assert ((steps - steps.floor() - 0.5).abs() > 1e-3).all(), "a tie: choose another seed"
    if axis is None:
        x_hat = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), low, high)
    else:
        x_hat = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis, low, high)
    x_q = torch.round(x_hat / column(scale)) + column(zero_point)
    return {
        "mode": mode,
        "num_bits": bits,
        "axis": axis,
        "x": x.tolist(),
        "scale": scale.tolist(),
        "zero_point": zero_point.int().tolist(),
        "x_q": x_q.int().tolist(),
    }


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1)  # (1 or C, 1)


def constants(slope) -> dict[int, float]:
    """The clipping constant of every bit width that qtool's tables cover."""
    return {bits: round(brentq(slope, 0.01, 30, args=(bits,)), 4) for bits in range(10)}


def laplace_slope(alpha: float, bits: int) -> float:
    """Slope of the squared error of clipping at alpha and rounding to bits, Laplace with b = 1."""
    return alpha / (3 * 4**bits) - math.exp(-alpha)


def gauss_slope(alpha: float, bits: int) -> float:
    """Slope of the squared error of clipping at alpha and rounding to bits, Gauss with std 1."""
    tail = math.sqrt(2 / math.pi) * math.exp(-(alpha**2) / 2)
    return alpha / (3 * 4**bits) + alpha * math.erfc(alpha / math.sqrt(2)) - tail


def write(name: str, made_by: str, content: dict[str, object]) -> None:
    tree = {"made_by": f"scripts/make_golden.py: {made_by}", **content}
    text = "{\n" + ",\n".join(f"{json.dumps(k)}: {_lines(v)}" for k, v in tree.items()) + "\n}\n"
    (GOLDEN / name).write_text(text, encoding="utf-8")


def _lines(value: object) -> str:
    """JSON, the items of a list in a line each."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"


if __name__ == "__main__":
    main()
