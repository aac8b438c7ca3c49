"""GMPO (arXiv 2507.20673): the geometric mean of a sequence's token ratios, each of which is clipped before the mean.

    l_k = -A exp(mean over the segment of b_j),    b_j = min(log r_j, log(1 + c eps_high)) if A > 0,
                                                   b_j = max(log r_j, log(1 - c eps_low)) if A <= 0

r_j is the ratio of token j. The segment is the sequence, as in the paper, or the turn (`algorithm.ratio`). A must be
the same for all tokens of a segment. The paper's range is e^-0.4 to e^0.4.
"""

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.turn_ratio import MAX_LOG_RATIO, segment_mean


def token_losses(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the policy term of each sampled token. The returned ratio is the geometric mean of clipped ratios."""
    segment_ids, num_segments = inputs.segments(config.ratio)
    assert segment_ids is not None, "the configuration allows ratio=token with other objectives only"
    log_ratio = logprobs - inputs.old_logprobs
    highest = torch.log1p(inputs.clip_scale * config.clip_high)
    lowest = (1.0 - inputs.clip_scale * config.clip_low).clamp(min=0.0).log()
    is_clipped = torch.where(inputs.advantages > 0, log_ratio > highest, log_ratio < lowest)
    limit = torch.where(inputs.advantages > 0, highest, lowest)
    mean = segment_mean(torch.where(is_clipped, limit, log_ratio), segment_ids, num_segments)[segment_ids]
    ratio = mean.clamp(max=MAX_LOG_RATIO).exp()
    return TokenLosses(loss=-inputs.advantages * ratio, ratio=ratio, is_clipped=is_clipped)
