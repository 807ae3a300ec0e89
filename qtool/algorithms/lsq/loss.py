"""What training minimizes: the distance to the float network's outputs, to the labels, or both."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """How far softened predictions are from those of the float network: T^2 * KL(wanted || logits).

    Args:
        logits: (N, classes), of the network that learns.
        wanted: (N, classes), of the float network.
        temperature: T, by which both are divided; the square keeps gradients of one size.

    Returns:
        (), the mean over the images, in nats.

    Reference:
        Hinton et al. 2015, arXiv:1503.02531, section 2.

    Example:
        >>> import torch
        >>> distillation_loss(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]), 1.0).item()
        0.6931471824645996
    """
    log_p = F.log_softmax(logits / temperature, dim=1)
    log_wanted = F.log_softmax(wanted / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_wanted, reduction="batchmean", log_target=True)


def mixed_loss(
    logits: Tensor, wanted: Tensor | None, labels: Tensor | None, distillation: float, temperature: float
) -> Tensor:
    """A share of distillation_loss, and the rest cross-entropy with the labels.

    Args:
        logits: (N, classes), of the network that learns.
        wanted: (N, classes), of the float network; None with a share of 0.
        labels: (N,); None with a share of 1.
        distillation: share of the float network, 0 to 1.
        temperature: see distillation_loss.
    """
    if wanted is None or distillation == 0:
        assert labels is not None
        return F.cross_entropy(logits, labels)
    loss = distillation * distillation_loss(logits, wanted, temperature)
    if distillation == 1:
        return loss
    assert labels is not None
    return loss + (1 - distillation) * F.cross_entropy(logits, labels)
