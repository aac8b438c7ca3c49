"""GRPO's outcome (arXiv 2402.03300): R_i against the other rollouts of its prompt, for methods that start from it."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def grpo_outcome(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """R_i z-scored with the sample standard deviation; the only rollout of a prompt keeps its R_i: [N] float64."""
    return normalize_groups(
        table.outcome,
        table.prompt_index,
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
        keep_single=True,
    )
