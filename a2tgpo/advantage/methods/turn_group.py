"""A2TGPO's advantage (arXiv:2605.06200): gains are normalised in turn groups, summed and rescaled."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.accumulate import accumulate_process_turns, place_turns
from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnAdvantages, TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def advantages(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> TurnAdvantages:
    """Return the advantages of all turns (Eq. 6-9).

    The final turn has R_i, the normalised outcome. A process turn has alpha D_{i,t} / sqrt(n_i - t + 1) + R_i.
    """
    normalized_gain = normalize_turn_groups(table, by_std=config.normalize_by_std, dp_group=dp_group)
    outcome = normalize_groups(
        table.outcome,
        table.prompt_index,
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
    )
    accumulated = accumulate_process_turns(
        normalized_gain, table.num_process_turns, gamma=config.gamma, rescale=config.rescale
    )
    return TurnAdvantages(
        advantages=place_turns(config.alpha * accumulated, outcome, table.num_process_turns),
        normalized_gain=normalized_gain,
        normalized_outcome=outcome,
    )


def normalize_turn_groups(
    table: TurnTable, *, by_std: bool, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return each gain normalised within its turn group (prompt, turn_index), [N, T] float64 (Eq. 6-7).

    If a turn has no gain, its value is 0. Every rank of `dp_group` must call this, even with an empty table.
    """
    present = table.has_gain
    normalized = torch.zeros_like(table.info_gain)
    normalized[present] = normalize_groups(
        table.info_gain[present],
        table.turn_bucket[present],
        num_groups=table.num_turn_buckets,
        dp_group=dp_group,
        by_std=by_std,
    )
    return normalized
