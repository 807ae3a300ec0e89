"""Numbers that compare outputs: accuracy of predictions, and closeness of tensors."""

import math

import torch
from torch import Tensor


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Which samples have their label among the k largest logits.

    Args:
        logits: (N, C).
        labels: (N,), class indices.
        k: at least 1; more than C counts as C.

    Returns:
        (N,), bool. Ties count in favour of the lower class index, whatever k is.
    """
    own = logits.gather(1, labels.unsqueeze(1))  # (N, 1)
    index = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > own) | ((logits == own) & (index < labels.unsqueeze(1)))
    # A NaN compares false with everything, which would rank the label first.
    return (ahead.sum(dim=1) < k) & logits.isfinite().all(dim=1)


def mse(x: Tensor, x_hat: Tensor) -> float:
    """Mean squared difference, accumulated in float64."""
    return float((x.double() - x_hat.double()).square().mean())


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal to quantization noise ratio, 10 log10(sum x^2 / sum (x - x_hat)^2), in dB.

    Returns:
        inf when there is no noise, -inf when there is noise and no signal, or infinite noise.

    Example:
        >>> round(sqnr_db(torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.0])), 3)
        20.0
    """
    signal = float(x.double().square().sum())
    return ratio_db(signal, float((x.double() - x_hat.double()).square().sum()))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), of powers; inf without noise, -inf without signal or with infinite noise."""
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio != 0 else -math.inf


def cosine_similarity(x: Tensor, x_hat: Tensor) -> float:
    """Cosine of the angle between two tensors seen as vectors; 1 when both are zero."""
    a, b = x.double().flatten(), x_hat.double().flatten()
    norms = float(a.norm() * b.norm())
    if norms == 0:
        return 1.0 if torch.equal(a, b) else 0.0
    return float(a @ b) / norms


def paired_standard_error(first: Tensor, second: Tensor) -> float:
    """Standard error of mean(second) - mean(first), both measured on the same samples.

    Args:
        first, second: (N,), bool or numbers.

    Returns:
        The sample standard deviation of the differences over sqrt(N); 0 for a single sample.
    """
    difference = second.double() - first.double()
    if difference.numel() < 2:
        return 0.0
    return float(difference.std() / math.sqrt(difference.numel()))
