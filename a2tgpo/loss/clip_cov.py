"""Clip-Cov (arXiv 2505.22617): give no gradient to a few of the tokens that lower the entropy most.

An update lowers the entropy if the log-probs and advantages of the tokens have a positive covariance. Most of the
covariance comes from a few confident tokens with a large advantage. Clip-Cov chooses a small share of these tokens at
random.
"""

import torch
import torch.distributed as dist

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.parallel.collectives import all_reduce_sum


def clip_covariance(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    draws: torch.Tensor,
    *,
    config: AlgorithmConfig,
    dp_group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Return which sampled tokens of a mini-batch get no gradient from the policy term, [n] bool.

    The covariance of a token is (log p - mean log p) (A - mean A), with means over the mini-batch. Of N tokens, about
    `clip_cov_share` * N are chosen among the tokens whose covariance is between `clip_cov_low` and `clip_cov_high`.
    The choice depends only on the tokens and on `draws`, so it is the same in every layout. Every rank of `dp_group`
    must call this, even with no token. Tokens with a log-prob that is not finite are not chosen.

    Args:
        logprobs: [n] log-probs of the policy that sampled the tokens.
        advantages: [n] advantage of each token.
        draws: [n] random numbers in [0, 1), fixed for each token.
    """
    logprobs, advantages = logprobs.double(), advantages.double()
    is_finite = logprobs.isfinite()
    logprobs = logprobs.where(is_finite, 0.0)
    sums = torch.stack([is_finite.sum().double(), logprobs.sum(), (advantages * is_finite).sum()])
    if dp_group is not None:
        sums = all_reduce_sum(sums, dp_group)
    num_tokens, logprob_sum, advantage_sum = sums.tolist()
    num_tokens = max(num_tokens, 1.0)
    covariance = (logprobs - logprob_sum / num_tokens) * (advantages - advantage_sum / num_tokens)
    in_band = is_finite & (covariance >= config.clip_cov_low) & (covariance <= config.clip_cov_high)
    num_in_band = in_band.sum().double()
    if dp_group is not None:
        num_in_band = all_reduce_sum(num_in_band, dp_group)
    # Each token whose covariance is within the limits is chosen independently of the others. The number of chosen
    # tokens is then right on average, and no rank needs to know the tokens of another rank.
    return in_band & (draws * float(num_in_band) < config.clip_cov_share * num_tokens)
