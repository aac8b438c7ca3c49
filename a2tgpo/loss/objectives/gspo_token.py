"""GSPO-token (arXiv 2507.18071): one ratio per sequence or turn, and a gradient that uses each token's own advantage.

    l_k = max(-s_k A_k, -clip(s_k, 1 - c eps_low, 1 + c eps_high) A_k),    s_k = sg(s) pi(y_k) / sg(pi(y_k))

sg stops the gradient, and s is the ratio of the token's segment (`algorithm.ratio`). The value of s_k is s, so the
segment is clipped as in `clipped_ratio`. The gradient of an unclipped token is -s A_k grad log pi(y_k). If all
advantages of a segment are equal, the gradient is that of `clipped_ratio`.
"""

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.objectives.clipped_ratio import clipped_losses
from a2tgpo.loss.turn_ratio import shared_log_ratio


def token_losses(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the clipped policy term of each sampled token."""
    segment_ids, num_segments = inputs.segments(config.ratio)
    constant = logprobs.detach()
    shared = shared_log_ratio(constant, inputs.old_logprobs, segment_ids, num_segments).exp()
    return clipped_losses(shared * (logprobs - constant).exp(), inputs, config)
