"""Normalise gains within turn groups, whose members have the same prompt and the same turn index."""

import torch
import torch.distributed as dist

from a2tgpo.advantage.group_norm import EPS, VARIANCE_FLOOR, group_deviations, group_sums, normalize_groups
from a2tgpo.advantage.turn_table import TurnTable
from a2tgpo.config.algorithm import AlgorithmConfig


def normalize_turn_groups(
    table: TurnTable, members: torch.Tensor, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each member's gain normalised within its turn group, and the spread of the group (Eq. 6-7).

    The spread is the standard deviation of the group's gains. A gain is divided by the spread, or by
    `algorithm.gain_spread_floor` if the spread is smaller. Every rank of `dp_group` must call this.

    Args:
        members: [N, T] bool: the turns that belong to turn groups.

    Returns:
        Two [N, T] float64. Turns outside `members` have 0 in both tensors, and a member that is alone in its group
        has normalised gain 0.
    """
    deviation, m2, count = group_deviations(
        table.info_gain[members],
        table.turn_bucket[members],
        num_groups=table.num_turn_buckets,
        dp_group=dp_group,
    )
    deviation = deviation.where(count > 1, 0.0)
    spread = (m2 / count.clamp(min=1) + VARIANCE_FLOOR).sqrt()
    divisor = spread.clamp(min=config.gain_spread_floor) + EPS
    return (
        _laid_out(deviation / divisor if config.normalize_by_std else deviation, members),
        _laid_out(spread, members),
    )


def deepest_turns(table: TurnTable, *, dp_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return for each trajectory the largest number of process turns in its prompt's group, [N] int64.

    Every rank of `dp_group` must call this, even with an empty table.
    """
    taken = torch.arange(table.max_turns) < table.num_process_turns[:, None]
    takers = group_sums(
        taken.double()[taken][None],
        table.turn_bucket[taken],
        num_groups=table.num_turn_buckets,
        dp_group=dp_group,
    )
    return (takers.reshape(table.num_prompts, table.max_turns) > 0).sum(dim=1)[table.prompt_index]


def _laid_out(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the shape of `places` with `values` where `places` is true, and 0 elsewhere."""
    laid_out = values.new_zeros(places.shape)
    laid_out[places] = values
    return laid_out


def normalize_outcomes(
    table: TurnTable, config: AlgorithmConfig, *, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return each outcome, normalised in its prompt's group by the population standard deviation, [N] float64."""
    return normalize_groups(
        table.outcome,
        table.prompt_index,
        num_groups=table.num_prompts,
        dp_group=dp_group,
        by_std=config.normalize_by_std,
    )
