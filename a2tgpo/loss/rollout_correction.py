"""Importance weights for the difference between the engine's and the trainer's probabilities.

The engine samples the trajectories, but the loss treats them as drawn from the trainer's policy. Even with the same
weights the two policies differ, because engine and trainer use different kernels and number formats. The weight w =
pi_trainer / pi_engine corrects for this difference. The variance of w is limited in one of two ways. Truncated
importance sampling uses min(w, upper) (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training"). Masking drops every token whose w is outside [lower, upper] (IcePop, arXiv 2510.18855).
"""

from dataclasses import dataclass

import torch

from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.turn_ratio import MAX_LOG_RATIO, segment_mean


@dataclass(frozen=True, kw_only=True)
class ImportanceWeights:
    """Importance weights per sampled token, all [n] and without gradient."""

    weights: torch.Tensor
    """Factor by which the token's policy loss is multiplied."""
    ratio: torch.Tensor
    """w before truncation or masking, at most e^10. 0 if w could not be computed."""
    is_truncated: torch.Tensor
    """bool: w is above `upper`, so the weight is `upper`."""
    is_masked: torch.Tensor
    """bool: w is outside [`lower`, `upper`], so the weight is 0."""
    is_unusable: torch.Tensor
    """bool: w could not be computed because a log-prob is not finite, so the weight is 0.

    If the trainer's log-prob is not finite, the policy ratio is not finite either. The update is then skipped.
    """


@torch.no_grad()
def importance_weights(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    segment_ids: torch.Tensor | None,
    num_segments: int,
    config: CorrectionConfig,
) -> ImportanceWeights:
    """Return the bounded importance weights w = exp(old_logprobs - rollout_logprobs).

    All tokens of a segment have the same w: the geometric mean of the segment's ratios, as in Eq. 10. If one log-prob
    is not finite, its whole segment is unusable.

    Args:
        old_logprobs: [n] log-probs that the trainer computed before the first update of the step.
        rollout_logprobs: [n] log-probs that the engine recorded when it sampled the tokens.
        segment_ids: [n] int64 turn or sequence of each token. None: every token is its own segment.
        config: its `kind` must be `truncate` or `mask`.
    """
    log_ratio = old_logprobs - rollout_logprobs
    if segment_ids is not None:
        log_ratio = segment_mean(log_ratio, segment_ids, num_segments)[segment_ids]
    is_unusable = ~log_ratio.isfinite()
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp().masked_fill(is_unusable, 0.0)
    none = torch.zeros_like(is_unusable)
    if config.kind == "truncate":
        weights, is_truncated, is_masked = ratio.clamp(max=config.upper), ratio > config.upper, none
    else:
        is_outside = ((ratio < config.lower) | (ratio > config.upper)) & ~is_unusable
        weights, is_truncated, is_masked = ratio.masked_fill(is_outside, 0.0), none, is_outside
    return ImportanceWeights(
        weights=weights,
        ratio=ratio,
        is_truncated=is_truncated,
        is_masked=is_masked,
        is_unusable=is_unusable,
    )
