"""Statistics and normalisation within groups whose members may be on different ranks."""

import torch
import torch.distributed as dist

from a2tgpo.parallel.collectives import all_gather_object, all_reduce_sum

EPS = 1e-6
"""Number added to a standard deviation before dividing by it."""
VARIANCE_FLOOR = 1e-8
"""Number added to a population variance before taking its square root."""


def normalize_groups(
    values: torch.Tensor,
    group_index: torch.Tensor,
    *,
    num_groups: int,
    dp_group: dist.ProcessGroup | None,
    by_std: bool = True,
    sample_std: bool = False,
    keep_single: bool = False,
) -> torch.Tensor:
    """Return the z-score of each value within its group. A group's members may be on several ranks of `dp_group`.

    Every rank of `dp_group` must call this, even if it has no values. The call costs two small all-reduces. The
    variance is computed in a second pass over the values, so the result is exact even if a group's mean is much
    larger than its spread.

    Args:
        values: [n] float64.
        group_index: [n] int64 in [0, num_groups), equal on all ranks for equal groups.
        num_groups: number of groups over all ranks.
        dp_group: the ranks that hold members of the groups. None: this rank holds all members.
        by_std: divide by the standard deviation. If False, only subtract the mean.
        sample_std: use the sample variance, as GRPO does. If False, use the population variance plus
            `VARIANCE_FLOOR`.
        keep_single: keep a value that is alone in its group unchanged, as GRPO does. If False, the value becomes 0.

    Raises:
        ValueError: if a group index is out of range.
    """
    deviation, m2, count = group_deviations(values, group_index, num_groups=num_groups, dp_group=dp_group)
    variance = m2 / (count - 1).clamp(min=1) if sample_std else m2 / count.clamp(min=1) + VARIANCE_FLOOR
    std = variance.sqrt()
    single = count <= 1
    if keep_single:
        deviation, std = deviation.where(~single, values), std.where(~single, 1.0)
    else:
        deviation = deviation.where(~single, 0.0)
    return deviation / (std + EPS) if by_std else deviation


def group_deviations(
    values: torch.Tensor, group_index: torch.Tensor, *, num_groups: int, dp_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each value minus its group's mean, the group's sum of squared deviations, and the group's size.

    All three are [n] float64. The arguments and errors are those of `normalize_groups`. Every rank of `dp_group` must
    call this.
    """
    moments = torch.stack([torch.ones_like(values), values])
    count, total = group_sums(moments, group_index, num_groups=num_groups, dp_group=dp_group)
    mean = total / count.clamp(min=1)
    deviation = values - mean[group_index]
    # `drift` corrects the sum of squares for the rounding of the mean (Chan et al.).
    moments = torch.stack([deviation * deviation, deviation])
    m2, drift = group_sums(moments, group_index, num_groups=num_groups, dp_group=dp_group)
    m2 = (m2 - drift * drift / count.clamp(min=1)).clamp(min=0)
    return deviation, m2[group_index], count[group_index]


def group_sums(
    values: torch.Tensor, group_index: torch.Tensor, *, num_groups: int, dp_group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the sum of each group's values over all ranks, [k, num_groups] float64, equal on all ranks.

    Every rank of `dp_group` must call this, even if it has no values.

    Args:
        values: [k, n] float64: k quantities of n members.
        group_index: [n] int64 in [0, num_groups), equal on all ranks for equal groups.

    Raises:
        ValueError: if a group index is out of range.
    """
    if group_index.numel() and (group_index.min() < 0 or group_index.max() >= num_groups):
        raise ValueError(f"group index outside [0, {num_groups}): {group_index.min()}..{group_index.max()}")
    sums = values.new_zeros(values.shape[0], num_groups).index_add_(1, group_index, values)
    return sums if dp_group is None else all_reduce_sum(sums, dp_group)


def index_groups(keys: torch.Tensor, *, dp_group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """Return the index of each key's group, [n] int64, and the count of groups over all ranks.

    Equal keys form a group. All ranks give the groups the same numbers. Every rank must call this, even if it has no
    keys.

    Args:
        keys: [n] int64, such as entries of `TurnTable.state`.
    """
    own = keys.unique()  # ascending
    lists = [own.tolist()] if dp_group is None else all_gather_object(own.tolist(), dp_group)
    distinct = torch.tensor(sorted(set().union(*lists)), dtype=torch.int64, device=keys.device)
    return torch.searchsorted(distinct, keys), distinct.numel()
