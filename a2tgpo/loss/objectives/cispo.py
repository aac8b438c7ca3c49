"""CISPO (MiniMax-M1, arXiv 2506.13585): the clipped ratio is a constant weight, so every token keeps a gradient.

    l_k = -sg(clip(s_k, 1 - c eps_low, 1 + c eps_high)) A_k log pi(y_k)

sg stops the gradient. The paper has no lower limit (`algorithm.clip_low=1`) and one ratio per token. The value of the
loss is not comparable with that of other objectives, because it contains log pi.
"""

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.adaptive_clip import clipped_ratio
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.turn_ratio import shared_log_ratio


def token_losses(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the policy term of each sampled token. A token is clipped if its weight differs from its ratio."""
    segment_ids, num_segments = inputs.segments(config.ratio)
    log_ratio = shared_log_ratio(logprobs.detach(), inputs.old_logprobs, segment_ids, num_segments)
    ratio = log_ratio.exp()
    weight = clipped_ratio(ratio, inputs.clip_scale, clip_low=config.clip_low, clip_high=config.clip_high)
    return TokenLosses(loss=-weight * inputs.advantages * logprobs, ratio=ratio, is_clipped=weight != ratio)
