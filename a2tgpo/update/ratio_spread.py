"""Measure how far the unclipped ratios of the loss spread around 1."""

from __future__ import annotations

import torch
from torch import Tensor

from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.turn_ratio import segment_mean
from a2tgpo.metrics.ratio_noise import SPREAD_METRICS
from a2tgpo.metrics.reduce import MetricSums


def spread_sums(log_ratio: Tensor, inputs: LossInputs, level: str) -> dict[str, Tensor]:
    """Return two float64 values: the sum of (log s)^2 over all ratios s, and the number of ratios.

    Args:
        log_ratio: [n] log-ratios of the micro-batch's sampled tokens, without gradient.
        level: the unit whose tokens share one ratio: token, turn or sequence.
    """
    ids, num_segments = inputs.segments(level)
    shared, is_ratio = log_ratio.double(), torch.ones_like(log_ratio, dtype=torch.bool)
    if ids is not None:
        shared = segment_mean(shared, ids, num_segments)
        is_ratio = torch.zeros_like(shared, dtype=torch.bool).index_fill(0, ids, True)
    return {"spread": shared.square().sum(), "ratios": is_ratio.sum().double()}


def record_spread(metrics: MetricSums, sums: dict[str, Tensor], *, num_updates: int) -> None:
    """Record a mini-batch's mean squared log-ratio, if `SPREAD_METRICS` has a metric for this number of updates."""
    if num_updates in SPREAD_METRICS and int(sums["ratios"]):
        metrics.add(SPREAD_METRICS[num_updates], float(sums["spread"]), int(sums["ratios"]))
