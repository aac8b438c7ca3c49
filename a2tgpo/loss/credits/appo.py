"""APPO's token credit (arXiv 2606.12384, after FIPO, arXiv 2603.19835): tokens before likelier tokens get more.

    A'_k = A_k (1 + weight f_k),    f_k = clip(exp(S_k), 1, 1 + upper)
    S_k = sum_{j >= k} 2^{-(j - k) / half_life} m_j (log pi - log pi_old)_j

The sum runs over the sampled tokens of the token's trajectory, over all turns. m_j is 0 if the ratio of token j is
not finite or exceeds `algorithm.dual_clip`, else 1. If a token's own ratio exceeds 6 and its advantage is negative,
f_k is clip(exp(S_k), 0.8, 1). `weight`, `upper` and `half_life` are settings of `algorithm.future`.
"""

import math

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs, TokenCredit

UNSAFE_RATIO = 6.0
"""A token with a larger ratio and a negative advantage gets an f of at most 1."""
LOWEST_UNSAFE = 0.8


def token_credit(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenCredit:
    """Return the scaled advantages, with measurements of f."""
    future = config.future
    log_ratio = logprobs.double() - inputs.old_logprobs.double()
    bound = math.log(config.dual_clip) if config.dual_clip else math.inf
    is_dropped = ~log_ratio.isfinite() | (log_ratio > bound)
    sums = discounted_sums(
        log_ratio.where(~is_dropped, 0.0), inputs.sequence_ids, gamma=0.5 ** (1 / future.half_life)
    )
    influence = sums.exp().clamp(1.0, 1.0 + future.upper)
    is_unsafe = (log_ratio > math.log(UNSAFE_RATIO)) & (inputs.advantages < 0)
    influence = influence.where(~is_unsafe, sums.exp().clamp(LOWEST_UNSAFE, 1.0))
    factor = 1.0 + future.weight * influence
    return TokenCredit(
        advantages=inputs.advantages * factor.to(inputs.advantages.dtype),
        measured={
            "influence": influence,
            "capped_share": influence >= 1.0 + future.upper,
            "dropped_share": is_dropped,
        },
    )


def discounted_sums(values: torch.Tensor, sequence_ids: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """For each value, return the discounted sum of this value and all later values of its sequence, [n].

    Args:
        values: [n]. The values of a sequence are neighbours, in their order.
        gamma: the discount from each value to the next.
    """
    if not values.numel():
        return values
    sums, reach = values, 1
    longest = int(torch.bincount(sequence_ids).max())
    while reach < longest:  # each pass doubles the number of values in a sum
        later = sums[reach:].where(sequence_ids[reach:] == sequence_ids[:-reach], 0.0)
        sums = sums + gamma**reach * torch.nn.functional.pad(later, (0, reach))
        reach *= 2
    return sums
