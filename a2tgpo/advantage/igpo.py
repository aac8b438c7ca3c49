"""IGPO's advantage (Eq. 4-5): gains of all turns pooled per prompt, discounted through the final turn."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import discounted_suffix_sums
from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def joint_pool_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Gains and outcomes of a prompt normalised in one pool."""
    return _pooled(table, config, dp_group, joint=True)


def separate_pool_advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Gains of a prompt normalised in one pool, outcomes in another."""
    return _pooled(table, config, dp_group, joint=False)


def _pooled(
    table: TurnTable, config: AlgorithmConfig, dp_group: dist.ProcessGroup | None, *, joint: bool
) -> TurnAdvantages:
    rows, columns = table.has_gain.nonzero(as_tuple=True)
    gain_pool = table.prompt_index[rows]
    outcome_pool = table.prompt_index if joint else table.prompt_index + table.num_prompts
    normalized = normalize_groups(
        torch.cat([table.info_gain[rows, columns], table.outcome]),
        torch.cat([gain_pool, outcome_pool]),
        num_groups=2 * table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
    )
    normalized_gain = torch.zeros_like(table.info_gain)
    normalized_gain[rows, columns] = normalized[: rows.numel()]
    outcome = normalized[rows.numel() :]
    rewards = torch.nn.functional.pad(normalized_gain, (0, 1))  # [N, T + 1]
    rewards.scatter_(1, table.num_process_turns[:, None], outcome[:, None])
    return TurnAdvantages(
        advantages=discounted_suffix_sums(rewards, gamma=config.gamma),
        normalized_gain=normalized_gain,
        normalized_outcome=outcome,
    )
