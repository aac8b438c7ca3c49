"""IGPO's advantage (Eq. 4-5): gains are normalised over all turns of a prompt, then summed with a discount."""

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
    """Return the advantages A_t = r_t + gamma A_{t+1} of all turns.

    In a process turn, r_t is the normalised gain. In the final turn, r_t is the normalised outcome. Every rank of
    `dp_group` must call this, even with an empty table.

    Args:
        outcome_pool: [N] int64 in [0, 2 num_prompts): the pool in which the outcome of each trajectory is normalised.
            The gains of prompt q are always in pool q.
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
