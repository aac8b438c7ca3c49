"""The clipped ratio of PPO, GRPO, DAPO and GSPO, and of A2TGPO with its clip scales (Eq. 12).

    l_k = max(-s A_k, -clip(s, 1 - c eps_low, 1 + c eps_high) A_k)

s is the ratio of the token, its turn or its sequence (`algorithm.ratio`). If a segment has L tokens, each of them
gets 1/L of the gradient of s. The tokens of a segment therefore share the mean of their advantages.
"""

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.adaptive_clip import clipped_ratio
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.turn_ratio import shared_log_ratio


def token_losses(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the clipped policy term of each sampled token, with the dual clip if it is on."""
    segment_ids, num_segments = inputs.segments(config.ratio)
    ratio = shared_log_ratio(logprobs, inputs.old_logprobs, segment_ids, num_segments).exp()
    return clipped_losses(ratio, inputs, config)


def clipped_losses(ratio: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the clipped policy terms for the given ratios, [n] with gradient."""
    bounded = clipped_ratio(ratio, inputs.clip_scale, clip_low=config.clip_low, clip_high=config.clip_high)
    plain, clipped = -inputs.advantages * ratio, -inputs.advantages * bounded
    token_loss = torch.maximum(plain, clipped)
    is_dual_clipped = None
    if config.dual_clip:
        ceiling = -inputs.advantages * config.dual_clip
        is_dual_clipped = (inputs.advantages < 0) & (token_loss > ceiling)
        token_loss = torch.where(inputs.advantages < 0, torch.minimum(token_loss, ceiling), token_loss)
    return TokenLosses(
        loss=token_loss,
        ratio=ratio,
        is_clipped=clipped.detach() > plain.detach(),
        is_dual_clipped=is_dual_clipped,
    )
