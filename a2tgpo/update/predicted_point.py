"""The point to which GXPO extrapolates two steps of AdamW (arXiv 2605.06755).

For each weight, w0 -> w1 -> w2 are the two steps with learning rate lr and weight decay wd. d0 and d1 are the two
steps without the decay, divided by -lr:

    d0 = ((1 - lr wd) w0 - w1) / lr        d1 = ((1 - lr wd) w1 - w2) / lr
    r  = d1 / d0, limited to [-2, 3]       how fast the steps shrink or grow
    q  = S_K(r) / S_2(r), limited to [1, K / 2 + 1], where S_n(r) = 1 + r + ... + r^(n - 1)
    w~ = w0 + alpha q (w2 - w0)

If every step were r times the one before, q (w2 - w0) would be the sum of K steps. A weight whose |d0| is at most
1e-3 is inactive, and has q = 1. AdamW's steps are about as large as lr, so the bound fits any lr.

The paper divides gradients, r = g1 / g0. Under AdamW the step is not the gradient, so this module follows the
authors' later release, which divides the steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_STEP = 1e-3
RATIO_RANGE = (-2.0, 3.0)
LEAST_DIVISOR = 1e-8
"""If |1 + r| is at most this number, the two steps cancel, and q is 1."""
SUMS = ("weights", "factor", "active", "active_ratio", "capped")
"""`predicted_point` sums these values over weights: 1, q, whether the weight is active, r of an active weight, and
whether q is at its cap."""


def predicted_point(
    start: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    weight_decay: float,
    horizon: int,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Return w~ and the sums of `SUMS`, [5] float64.

    Args:
        start, first, second: [n] w0, w1 and w2, in float32 or float64. w~ has the same dtype. The function computes
            in float64, because the steps are small differences of weights.
        lr: the learning rate, > 0.
        horizon: K, at least 2.
    """
    w0, w1, w2 = start.double(), first.double(), second.double()
    kept = 1 - lr * weight_decay
    d0, d1 = (kept * w0 - w1) / lr, (kept * w1 - w2) / lr
    active = d0.abs() > LEAST_STEP
    ratio = (d1 / d0).clamp(*RATIO_RANGE)
    steps = torch.ones_like(ratio)
    for _ in range(horizon - 1):
        steps = 1 + ratio * steps
    cap = horizon / 2 + 1
    factor = (steps / (1 + ratio)).clamp(1, cap)
    usable = active & ((1 + ratio).abs() > LEAST_DIVISOR) & factor.isfinite()
    factor = factor.where(usable, 1.0)
    point = w0 + alpha * factor * (w2 - w0)
    sums = [
        torch.full_like(factor, 1.0).sum(),
        factor.sum(),
        active.double().sum(),
        ratio.where(active & ratio.isfinite(), 0.0).sum(),
        (factor == cap).double().sum(),
    ]
    return point.to(start.dtype), torch.stack(sums)
