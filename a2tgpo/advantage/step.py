"""Compute the advantage and the clip scale of each turn from a step's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.trajectory import Trajectory

if TYPE_CHECKING:
    from a2tgpo.assemble import RunParts


def step_advantages(
    parts: RunParts, trajectories: Sequence[Trajectory]
) -> tuple[TurnTable, TurnAdvantages, torch.Tensor]:
    """Return the turn table, turn advantages and clip scales [N, T + 1] of this replica's trajectories.

    Group statistics are merged over all replicas, so every rank must call this.
    """
    config = parts.config
    table = build_turn_table(
        trajectories,
        num_prompts=config.rollout.prompts_per_step,
        max_turns=config.rollout.max_turns,
        failed_calls=config.algorithm.failed_calls,
    )
    result = compute_advantages(table, config.algorithm, dp_group=parts.groups.dp_group)
    gains = torch.nn.functional.pad(
        result.normalized_gain, (0, 1)
    )  # the final turn has no gain, so its scale is 1
    return table, result, clip_scale(gains, beta=config.algorithm.clip_beta)
