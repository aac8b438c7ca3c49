"""The clipped policy objective on the sampled tokens of one micro-batch (Eq. 12)."""

from dataclasses import dataclass

import torch

from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.loss.adaptive_clip import clipped_ratio
from a2tgpo.loss.kl import kl_penalty
from a2tgpo.loss.turn_ratio import shared_log_ratio


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Flat tensors over the n sampled tokens of one micro-batch. n may be 0."""

    old_logprobs: torch.Tensor
    """[n]: log-probs that the trainer computed before the first update of the step."""
    advantages: torch.Tensor
    """[n]: advantage of the token's turn."""
    clip_scale: torch.Tensor
    """[n]: clip scale c of the token's turn."""
    weights: torch.Tensor
    """[n]: weight of the token in the loss, see `aggregate.token_weights`."""
    turn_ids: torch.Tensor
    """[n] int64: number of the token's turn within the micro-batch."""
    sequence_ids: torch.Tensor
    """[n] int64: number of the token's trajectory within the micro-batch."""
    num_turns: int
    num_sequences: int
    ref_logprobs: torch.Tensor | None = None
    """[n]: log-probs of the reference model. Required if kl_coef > 0."""
    importance: torch.Tensor | None = None
    """[n]: importance weights without gradient, see `rollout_correction.importance_weights`. None: no correction."""
    is_cov_clipped: torch.Tensor | None = None
    """[n] bool: tokens whose log-prob is a constant in the ratio, see `clip_cov`. None: no such tokens."""
    entropy: torch.Tensor | None = None
    """[n] with gradient, nats: entropy of the distribution that predicts the token. None: no entropy term."""


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The loss of a micro-batch, with gradient. The other fields, [n] without gradient, are for the metrics."""

    loss: torch.Tensor
    token_loss: torch.Tensor
    """The token's policy term, before it is multiplied by the importance weight and the token weight."""
    ratio: torch.Tensor
    is_clipped: torch.Tensor
    """bool: the clipped term is strictly larger than the unclipped term, so clipping changed the loss."""
    is_dual_clipped: torch.Tensor
    """bool: the dual clip lowered the token's loss."""
    kl: torch.Tensor
    """Estimated KL to the reference. 0 if there is no reference."""


def policy_loss(
    logprobs: torch.Tensor, inputs: LossInputs, config: AlgorithmConfig, *, entropy_weight: float = 0.0
) -> PolicyLoss:
    """Return the weighted sum of max(-s A, -clip(s, 1 - c eps_low, 1 + c eps_high) A) over the sampled tokens.

    Here s is the ratio, A the advantage and c the clip scale of a token. The importance weights multiply this policy
    term, but neither the KL penalty nor the entropy term. The returned `loss` is this micro-batch's share of the
    mini-batch's loss.

    Args:
        logprobs: [n] log-probs of the current policy, with gradient.
        entropy_weight: the factor of the entropy term, see `entropy.EntropyWeight`.
    """
    segment_ids, num_segments = segments(inputs, config.ratio)
    trained = logprobs
    if inputs.is_cov_clipped is not None:
        trained = logprobs.where(~inputs.is_cov_clipped, logprobs.detach())
    ratio = shared_log_ratio(trained, inputs.old_logprobs, segment_ids, num_segments).exp()
    bounded = clipped_ratio(ratio, inputs.clip_scale, clip_low=config.clip_low, clip_high=config.clip_high)
    plain, clipped = -inputs.advantages * ratio, -inputs.advantages * bounded
    token_loss = torch.maximum(plain, clipped)
    is_dual_clipped = torch.zeros_like(token_loss, dtype=torch.bool)
    if config.dual_clip:
        ceiling = -inputs.advantages * config.dual_clip
        is_dual_clipped = (inputs.advantages < 0) & (token_loss > ceiling)
        token_loss = torch.where(inputs.advantages < 0, torch.minimum(token_loss, ceiling), token_loss)
    total = token_loss if inputs.importance is None else inputs.importance * token_loss
    kl = torch.zeros_like(token_loss)
    if inputs.ref_logprobs is not None:
        kl = kl_penalty(logprobs, inputs.ref_logprobs, config.kl_estimator)
        total = total + config.kl_coef * kl
    if inputs.entropy is not None:
        total = total - entropy_weight * inputs.entropy
    return PolicyLoss(
        loss=(inputs.weights * total).sum(),
        token_loss=token_loss.detach(),
        ratio=ratio.detach(),
        is_clipped=clipped.detach() > plain.detach(),
        is_dual_clipped=is_dual_clipped,
        kl=kl.detach(),
    )


def segments(inputs: LossInputs, level: str) -> tuple[torch.Tensor | None, int]:
    """Return the segment id of each token, [n], and the number of segments.

    `level` is turn, sequence or token. At token level, return (None, 0), because every token is its own segment.
    """
    if level == "turn":
        return inputs.turn_ids, inputs.num_turns
    if level == "sequence":
        return inputs.sequence_ids, inputs.num_sequences
    return None, 0
