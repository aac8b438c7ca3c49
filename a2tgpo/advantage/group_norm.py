"""Normalisation inside groups whose members may sit on different ranks."""

import torch
import torch.distributed as dist

EPS = 1e-6
"""Added to the standard deviation (ALGORITHM: eps)."""
VARIANCE_FLOOR = 1e-8
"""Added to the population variance before the square root."""


def normalize_groups(
    values: torch.Tensor,
    group_index: torch.Tensor,
    *,
    num_groups: int,
    dp_group: dist.ProcessGroup | None,
    by_std: bool = True,
    sample_std: bool = False,
) -> torch.Tensor:
    """Z-score each value within its group; statistics are merged over `dp_group`.

    Every rank of `dp_group` must call this, also with no values: two all-reduces of `[num_groups]` float64 run
    over it. Mean and centred second moment are taken in two passes, so the result stays exact when a group's mean
    is large against its spread, and does not depend on how members are spread over ranks (to rounding in float64).

    Args:
        values: [n] float64.
        group_index: [n] int64 in [0, num_groups), equal on all ranks for equal groups.
        num_groups: number of groups over all ranks.
        dp_group: ranks that hold members; None: this rank holds all of them.
        by_std: divide by the standard deviation, not only subtract the mean.
        sample_std: GRPO's convention: n - 1 in the variance, no variance floor, and a group of one keeps its
            value (mean 0, std 1). Otherwise population variance + floor, and a group of one gives 0.

    Returns:
        [n] float64.

    Raises:
        ValueError: if a group index is out of range.
    """
    if values.numel() and (group_index.min() < 0 or group_index.max() >= num_groups):
        raise ValueError(f"group index outside [0, {num_groups}): {group_index.min()}..{group_index.max()}")
    count = _sum_by_group(torch.ones_like(values), group_index, num_groups)
    total = _sum_by_group(values, group_index, num_groups)
    count, total = _all_reduce(torch.stack([count, total]), dp_group)
    mean = total / count.clamp(min=1)
    deviation = values - mean[group_index]
    # Chan et al.'s correction term: the mean itself carries rounding, its effect on M2 is removed.
    m2 = _sum_by_group(deviation * deviation, group_index, num_groups)
    drift = _sum_by_group(deviation, group_index, num_groups)
    m2, drift = _all_reduce(torch.stack([m2, drift]), dp_group)
    m2 = m2 - drift * drift / count.clamp(min=1)
    single = count[group_index] <= 1
    if sample_std:
        std = (m2 / (count - 1).clamp(min=1)).clamp(min=0).sqrt()[group_index].where(~single, 1.0)
        centred = deviation.where(~single, values)
    else:
        std = ((m2 / count.clamp(min=1)).clamp(min=0) + VARIANCE_FLOOR).sqrt()[group_index]
        centred = deviation.where(~single, 0.0)
    return centred / (std + EPS) if by_std else centred


def _sum_by_group(values: torch.Tensor, group_index: torch.Tensor, num_groups: int) -> torch.Tensor:
    return values.new_zeros(num_groups).index_add_(0, group_index, values)  # [num_groups]


def _all_reduce(stacked: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(stacked, group=group)
    return stacked
