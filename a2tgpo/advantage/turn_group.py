"""Normalisation within turn groups: the same turn index of one prompt's trajectories."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.group_norm import normalize_groups
from a2tgpo.advantage.turn_table import TurnTable


def normalize_turn_groups(
    table: TurnTable, *, by_std: bool, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Z-score every gain within its turn group (prompt, turn_index) (Eq. 6-7): [N, T] float64, 0 where neutral.

    Every rank of `dp_group` must call this, even with an empty table.
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
