"""Metrics of a step's advantages, clip scales and normalised gains."""

import torch

from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.metrics.reduce import MetricSums

NARROW_SPREAD = 0.01
"""A turn group is narrow if the standard deviation of its gains is smaller than this number."""


def add_advantage_metrics(
    metrics: MetricSums, table: TurnTable, advantages: TurnAdvantages, clip_scales: torch.Tensor
) -> None:
    """Add to `metrics` the extremes and means of advantages and clip scales over all turns of this replica's
    trajectories.

    `advantage/process_mean` is the mean over process turns alone. It is near 0 if a method compares a turn only with
    turns of the same prompt and index. `advantage/narrow_signal_share` is the sum of |normalised gain| over all
    narrow turn groups, divided by the same sum over all turn groups.
    """
    columns = torch.arange(table.max_turns + 1)
    present = columns <= table.num_process_turns[:, None]  # [N, T + 1]
    for prefix, values in (
        ("advantage/", advantages.advantages[present]),
        ("clip/scale_", clip_scales[present]),
    ):
        metrics.add(f"{prefix}mean", values.sum().item(), values.numel())
        if values.numel():
            metrics.add_max(f"{prefix}max", values.max().item())
            metrics.add_min(f"{prefix}min", values.min().item())
    process = advantages.advantages[columns < table.num_process_turns[:, None]]
    metrics.add("advantage/process_mean", process.sum().item(), process.numel())
    if advantages.gain_spread is not None:
        signal = advantages.normalized_gain.abs()
        narrow = signal[advantages.gain_spread < NARROW_SPREAD]
        metrics.add("advantage/narrow_signal_share", narrow.sum().item(), signal.sum().item())
