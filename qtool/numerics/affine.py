"""The arithmetic of affine quantization. One convention, used everywhere in qtool:

    x_q   = clamp(round(x / scale) + zero_point, quant_min, quant_max)
    x_hat = (x_q - zero_point) * scale          ties round to even, as torch.round does

Between quantized layers qtool passes `x_q - zero_point`, the *centered* integers, held exactly
in float32: their product with `scale` is x_hat, zero padding is exact, and a convolution of
them is the integer accumulator. A symmetric grid of b bits spans [-v, v] with (2^b - 1) / 2
steps on each side (127.5 at 8 bits), so +v saturates by half a step; with narrow_range it has
2^(b-1) - 1 (127). This is Distiller's and torch's rule; NNCF divides by 127 in both cases. An
unsigned symmetric grid spans [0, v] with 2^b - 1 steps.
"""

import torch
from torch import Tensor

from qtool.numerics.spec import QParams, QuantSpec


def qparams_from_range(
    x_min: Tensor, x_max: Tensor, spec: QuantSpec, scale_approx_bits: int | None = None
) -> QParams:
    """Choose the scale and zero_point that map [x_min, x_max] onto spec's grid.

    Zero is always inside the range, so padding and ReLU stay exact. A range without extent
    gets scale 1, with which everything in it is exact. So does one narrower than about 1e-33,
    whose steps float32 cannot hold; everything in it becomes zero.

    Args:
        x_min: smallest value to represent, shape () or (C,), units of x.
        x_max: largest value to represent, same shape as x_min.
        spec: the grid to map onto.
        scale_approx_bits: see approximate_multiplier; zero_point is that of the exact scale.

    Returns:
        QParams with scale and zero_point of the same shape as x_min.

    Raises:
        ValueError: if any x_min is greater than its x_max, or is not finite.

    Reference:
        Krishnamoorthi 2018, arXiv:1806.08342, section 2.

    Example:
        >>> spec = QuantSpec(symmetric=False)
        >>> q = qparams_from_range(torch.tensor(-1.0), torch.tensor(2.0), spec)
        >>> round(q.scale.item(), 6), int(q.zero_point)
        (0.011765, -43)
    """
    x_min, x_max = x_min.float(), x_max.float()
    if not bool(torch.isfinite(x_max - x_min).all()):
        low, high = x_min.min().item(), x_max.max().item()
        raise ValueError(f"x_min and x_max must be finite, and so their distance, found {low:g} and {high:g}")
    if bool((x_min > x_max).any()):
        worst = int((x_min - x_max).argmax())
        low, high = x_min.reshape(-1)[worst].item(), x_max.reshape(-1)[worst].item()
        raise ValueError(f"x_min must not be greater than x_max, found {low:g} and {high:g}")
    steps_per_unit, zero_point = (_symmetric if spec.symmetric else _asymmetric)(x_min, x_max, spec)
    if scale_approx_bits is not None:
        steps_per_unit = approximate_multiplier(steps_per_unit, scale_approx_bits)
    return QParams(1 / steps_per_unit, zero_point, spec)


def _symmetric(x_min: Tensor, x_max: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Steps per unit of x, and zero points, of a range [-v, v], or [0, v] if unsigned."""
    if not spec.signed:
        return _steps_per_unit(spec.quant_max, x_max.clamp(min=0)), torch.zeros_like(x_max)
    v = torch.maximum(x_min.abs(), x_max.abs())
    steps = spec.quant_max if spec.narrow_range else (2**spec.num_bits - 1) / 2
    return _steps_per_unit(steps, v), torch.zeros_like(v)


def _asymmetric(x_min: Tensor, x_max: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Steps per unit of x, and zero points, of a range [x_min, x_max] widened to hold zero."""
    low, high = x_min.clamp(max=0), x_max.clamp(min=0)
    steps_per_unit = _steps_per_unit(2**spec.num_bits - 1, high - low)
    return steps_per_unit, spec.quant_min - torch.round(steps_per_unit * low)


def _steps_per_unit(steps: float, extent: Tensor) -> Tensor:
    """steps / extent; 1 where there is no extent, or so little that the scale would be no normal float32."""
    quotient = steps / extent
    return torch.where(quotient.abs() <= 2.0**126, quotient, 1.0)  # -0.0 gives -inf


def approximate_multiplier(multiplier: Tensor, num_bits: int) -> Tensor:
    """The nearest value below of the form integer / 2^shift, the integer of at most num_bits.

    Hardware without floats multiplies by such a number with one integer product and one shift.
    The relative error is below 2^-(num_bits - 1).

    Args:
        multiplier: positive, any shape.
        num_bits: width of the integer, at least 2: with one bit the formula can give 0.

    Raises:
        ValueError: if num_bits is below 2.

    Reference:
        Jacob et al. 2018, arXiv:1712.05877, section 2.2.

    Example:
        >>> approximate_multiplier(torch.tensor(0.3), 8).item()
        0.298828125
    """
    if num_bits < 2:
        raise ValueError(f"num_bits of a multiplier must be at least 2, found {num_bits}")
    exact = multiplier.double()
    power = torch.exp2(torch.floor(torch.log2((2**num_bits - 1) / exact)))
    return (torch.floor(exact * power) / power).to(multiplier.dtype)


def along_axis(values: Tensor, axis: int | None, num_dims: int) -> Tensor:
    """Reshape values of shape (C,) so that they broadcast along axis of a num_dims tensor."""
    if axis is None or values.dim() == 0:
        return values
    shape = [1] * num_dims
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The integers x_q of x, in x's shape and dtype (integers are held in floats)."""
    return quantize_centered(x, qparams) + along_axis(qparams.zero_point, qparams.spec.axis, x.dim())


def quantize_centered(x: Tensor, qparams: QParams) -> Tensor:
    """The centered integers x_q - zero_point of x, in x's shape and dtype; NaN stays NaN."""
    low, high = centered_limits(qparams, x.dim())
    scale = along_axis(qparams.scale, qparams.spec.axis, x.dim())
    return torch.clamp(torch.round(x / scale), low, high)


def centered_limits(qparams: QParams, num_dims: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest centered integer, shaped to broadcast against num_dims."""
    zero_point = along_axis(qparams.zero_point, qparams.spec.axis, num_dims)
    return qparams.spec.quant_min - zero_point, qparams.spec.quant_max - zero_point


def dequantize(x_q: Tensor, qparams: QParams) -> Tensor:
    """The values x_hat that the integers x_q stand for."""
    zero_point = along_axis(qparams.zero_point, qparams.spec.axis, x_q.dim())
    return dequantize_centered(x_q - zero_point, qparams)


def dequantize_centered(x_centered: Tensor, qparams: QParams) -> Tensor:
    """The values x_hat that centered integers stand for."""
    return x_centered * along_axis(qparams.scale, qparams.spec.axis, x_centered.dim())


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """What survives of x: quantize, then dequantize. Same shape and dtype as x.

    Example:
        >>> spec = QuantSpec(num_bits=2, narrow_range=True)
        >>> q = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), spec)
        >>> fake_quantize(torch.tensor([-3.0, 0.2, 0.6]), q).tolist()
        [-1.0, 0.0, 1.0]
    """
    return dequantize_centered(quantize_centered(x, qparams), qparams)
