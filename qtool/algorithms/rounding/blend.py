"""How much of the errors in front of it a layer is to make up for, judged by rows that are held out.

On inputs x_hat of the quantized network a weight can be chosen for what the float network gives, W x
("asymmetric"), or for W x_hat ("symmetric"). The first makes up for errors of the layers in front, as far as
these follow from what the layer reads; what does not is noise, and is fitted on the rows that are looked at
alone. With 8 bits of activations nearly all of it is noise, with 4 bits of weights a good part is not. So the
weight that is wanted is W + a D: D is the change that asymmetric rows ask for, damped, and a has the least
loss on each half of the images for a D found on the other.

Reference:
    The asymmetric target: Nagel et al. 2020, arXiv:2004.10568, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.algorithms.rounding.quadratic import Quadratic

# Of the change, as a share of the mean of the Hessian's diagonal; 0.1 and 10 gave no more.
DAMPING = 1.0


def blended(whole: Quadratic, weight: Tensor) -> Quadratic:
    """The form for what a layer is to give, between the outputs of whole and those of the float weight.

    Args:
        whole: of all rows, for the float network's outputs, and of its two halves.
        weight: (G, R, K), the float weight.
    """
    if not bool(whole.hessian.isfinite().all() & whole.linear.isfinite().all()):
        return whole
    share = _share(whole.halves, weight)
    return whole.for_weight(weight + share * _change(whole, weight) if share else weight)


def _share(halves: Sequence[Quadratic], weight: Tensor) -> float:
    """How much of the change has the least loss on rows that are held out; never below 0."""
    # The loss of a share a of the change falls by 2 a slope - a^2 curvature.
    slope = curvature = 0.0
    for seen, held_out in (halves, halves[::-1]):
        change = _change(seen, weight)
        slope += float((_pull(held_out, weight) * change).sum())
        curvature += float(((change @ held_out.hessian) * change).sum())
    return max(slope / curvature, 0.0) if curvature > 0 else 0.0


def _pull(form: Quadratic, weight: Tensor) -> Tensor:
    """Where the loss falls from weight, (G, R, K)."""
    return form.linear - weight @ form.hessian


def _change(form: Quadratic, weight: Tensor) -> Tensor:
    """The step from weight to the least loss, with damping; (G, R, K)."""
    hessian, _ = form.damped(DAMPING, weight)
    # float32 is exact enough for what is shrunk and compared, and takes half the time.
    factor = torch.linalg.cholesky(hessian.float())
    return torch.cholesky_solve(_pull(form, weight).float().mT, factor).mT.double()
