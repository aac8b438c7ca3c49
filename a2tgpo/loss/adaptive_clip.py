"""Clipping ranges that depend on the turn's gain (Eq. 11-12)."""

import torch


def clip_scale(normalized_gain: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return the clip scale c = 1 + beta (2 sigmoid(gain) - 1) for each gain. A gain of 0 has scale 1."""
    return 1.0 + beta * (2.0 * torch.sigmoid(normalized_gain) - 1.0)


def clipped_ratio(
    ratio: torch.Tensor, scale: torch.Tensor, *, clip_low: float, clip_high: float
) -> torch.Tensor:
    """Return clip(s, 1 - c eps_low, 1 + c eps_high) for each ratio s with its scale c, [n]."""
    return torch.maximum(torch.minimum(ratio, 1.0 + scale * clip_high), 1.0 - scale * clip_low)
