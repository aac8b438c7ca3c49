"""Aggregate token losses into a weighted sum, in which all tokens of a trajectory have the same weight.

The weights are normalised over the whole mini-batch. Therefore the sum does not depend on how the trajectories are
divided over micro-batches and ranks.
"""

import torch
import torch.distributed as dist

from a2tgpo.parallel.collectives import all_reduce_sum


def token_weights(
    num_sampled_tokens: torch.Tensor,
    *,
    aggregation: str,
    norm_length: int,
    dp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Return the weight w_i of each sampled token of trajectory i, where loss = sum_i w_i sum_k l_{i,k}.

    Every rank of `dp_group` must call this, even without trajectories. A trajectory without tokens is not counted.

    Args:
        num_sampled_tokens: [N] int64: the number of sampled tokens in each of this rank's trajectories.
        aggregation: `seq-mean-token-mean` (Eq. 12), `token-mean`, `seq-mean-token-sum` or `seq-mean-token-sum-norm`.
        norm_length: the number of tokens by which `seq-mean-token-sum-norm` divides.

    Returns:
        [N] float64.
    """
    tokens = num_sampled_tokens.to(torch.float64)
    totals = torch.stack([(tokens > 0).sum().to(torch.float64), tokens.sum()])
    if dp_group is not None:
        totals = all_reduce_sum(totals, dp_group)
    num_trajectories, num_tokens = totals.clamp(min=1)
    ones = torch.ones_like(tokens)
    if aggregation == "token-mean":
        return ones / num_tokens
    if aggregation == "seq-mean-token-mean":
        return ones / (num_trajectories * tokens.clamp(min=1))
    if aggregation == "seq-mean-token-sum":
        return ones / num_trajectories
    return ones / norm_length
