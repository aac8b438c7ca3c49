"""IGPO's advantage (Eq. 4-5): gains of all turns pooled per prompt, discounted through the final turn."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import discounted_suffix_sums
from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def pooled_advantages(
    table: TurnTable,
    config: AlgorithmConfig,
    *,
    outcome_pool: torch.Tensor,
    dp_group: dist.ProcessGroup | None,
) -> TurnAdvantages:
    """Compute A_t = r_t + gamma A_{t+1} through the final turn; r_t is the normalised gain, in the final turn the
    outcome.

    Every rank of `dp_group` must call this, even with an empty table.

    Args:
        outcome_pool: [N] int64 in [0, 2 num_prompts): pool in which each outcome is normalised; gains of prompt q are
            in pool q.
    """
    rows, columns = table.has_gain.nonzero(as_tuple=True)
    normalized = normalize_groups(
        torch.cat([table.info_gain[rows, columns], table.outcome]),
        torch.cat([table.prompt_index[rows], outcome_pool]),
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
