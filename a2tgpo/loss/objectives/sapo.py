"""SAPO (arXiv 2511.20347): a soft gate in place of the clipping range.

    l_k = -(4 / tau) sigmoid(tau (s_k - 1)) A_k,    tau = sapo_tau_positive if A_k > 0, else sapo_tau_negative

At s = 1 the gradient is that of the plain ratio. The gradient falls smoothly as s moves away from 1 on either side.
The paper has one ratio per token.
"""

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.inputs import LossInputs, TokenLosses
from a2tgpo.loss.turn_ratio import shared_log_ratio


def token_losses(logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig) -> TokenLosses:
    """Return the gated policy term of each sampled token. No token is marked as clipped."""
    segment_ids, num_segments = inputs.segments(config.ratio)
    ratio = shared_log_ratio(logprobs, inputs.old_logprobs, segment_ids, num_segments).exp()
    negative = torch.full_like(ratio, config.sapo_tau_negative)
    tau = negative.masked_fill(inputs.advantages > 0, config.sapo_tau_positive)
    gate = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0))
    return TokenLosses(
        loss=-gate * inputs.advantages,
        ratio=ratio,
        is_clipped=torch.zeros_like(ratio, dtype=torch.bool),
    )
