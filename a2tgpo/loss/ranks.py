"""Ranks of values within groups."""

import torch

from a2tgpo.loss.turn_ratio import segment_mean


def average_ranks(values: torch.Tensor, group_ids: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the rank of each value in its group, [n] float64. The lowest value has rank 1.

    Equal values have the mean of their ranks. The values must be finite.

    Args:
        values: [n].
        group_ids: [n] int64 in [0, num_groups).
    """
    order = values.argsort(stable=True)
    order = order[group_ids[order].argsort(stable=True)]
    groups, ordered = group_ids[order], values[order]
    begins = torch.ones_like(groups, dtype=torch.bool)
    begins[1:] = (groups[1:] != groups[:-1]) | (ordered[1:] != ordered[:-1])
    ties = begins.cumsum(0) - 1  # index of each run of equal values
    places = torch.arange(len(order), dtype=torch.float64, device=values.device)
    counts = torch.bincount(group_ids, minlength=num_groups)
    starts = counts.cumsum(0) - counts
    found = segment_mean(places, ties, len(order))[ties] - starts[groups] + 1
    return torch.empty_like(found).index_copy_(0, order, found)
