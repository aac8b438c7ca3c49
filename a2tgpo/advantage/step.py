"""Compute the advantage and the clip scale of each turn in a step's trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from a2tgpo.advantage.estimator import compute_advantages
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable, build_turn_table
from a2tgpo.config.run import RunConfig
from a2tgpo.loss.adaptive_clip import clip_scale
from a2tgpo.parallel.groups import ParallelGroups
from a2tgpo.trajectory import Trajectory


def step_advantages(
    trajectories: Sequence[Trajectory], config: RunConfig, groups: ParallelGroups
) -> tuple[TurnTable, TurnAdvantages, torch.Tensor]:
    """Return this replica's turn table, advantages, and clip scales [N, T + 1]. Every rank must call this."""
    table = build_turn_table(
        trajectories,
        num_prompts=config.rollout.prompts_per_step,
        max_turns=config.rollout.max_turns,
        failed_calls=config.algorithm.failed_calls,
        turn_signal=config.algorithm.turn_signal,
        # If the group size is not 1, a trajectory is alone in its group only if rewards could not judge the others.
        keep_single=config.rollout.group_size == 1,
    )
    result = compute_advantages(table, config.algorithm, dp_group=groups.dp_group)
    # The final turn gets gain 0, so its scale is 1.
    gains = torch.nn.functional.pad(result.normalized_gain, (0, 1))
    return table, result, clip_scale(gains, beta=config.algorithm.clip_beta)
