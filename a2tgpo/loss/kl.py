"""Per-token estimators of KL(policy || reference) (Schulman's k1, k2, k3)."""

import torch

MAX_KL = 10.0
"""Largest absolute value of a token's k3 estimate, nats."""


def kl_penalty(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Return an estimate of each token's KL, [n] nats.

    With d = `ref_logprobs` - `logprobs`, the estimators are k1 = -d, k2 = d^2 / 2 and k3 = e^d - d - 1.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference * difference
    # After a bad update exp could overflow, so the log-ratio is clamped.
    d = (-difference).clamp(-20.0, 20.0)
    return (d.exp() - d - 1.0).clamp(-MAX_KL, MAX_KL)
