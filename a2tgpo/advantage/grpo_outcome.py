"""GRPO's outcome advantage (arXiv 2402.03300): R_i normalised within its prompt's group."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def grpo_outcome(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the outcomes R_i, normalised by `grpo_normalized`."""
    return grpo_normalized(table.outcome, table, config, dp_group=dp_group)


def grpo_normalized(
    values: torch.Tensor, table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Normalise `values` within the groups of their prompts, and return the result, [N] float64.

    `values` has one value per trajectory. The sample standard deviation is used. For a value that is alone in its
    group, the mean is taken as 0 and the standard deviation as 1.
    """
    return normalize_groups(
        values,
        table.prompt_index,
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
        sample_std=True,
        keep_single=table.keep_single,
    )
