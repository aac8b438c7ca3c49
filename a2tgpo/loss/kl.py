"""Per-token estimators of KL(policy || reference) (Schulman's k1, k2, k3)."""

import torch

MAX_KL = 10.0
"""Bound of a token's k3 estimate, nats."""


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """[n] nats: k1 = lp - ref, k2 = (lp - ref)^2 / 2, k3 = e^d - d - 1 with d = ref - lp, in [-10, 10]."""
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference * difference
    # After a bad update exp could overflow, so the log-ratio is clamped; the estimate is bounded as well.
    d = (-difference).clamp(-20.0, 20.0)
    return (d.exp() - d - 1.0).clamp(-MAX_KL, MAX_KL)
