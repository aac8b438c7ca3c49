"""The inputs of a micro-batch's loss, and the results of objectives and token credits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Flat tensors over the n sampled tokens of one micro-batch. n may be 0.

    A micro-batch contains whole trajectories, and every context-parallel rank of the last pipeline stage has all
    their tokens. Therefore a sum over a turn or a trajectory needs no other rank.
    """

    old_logprobs: torch.Tensor
    """[n]: log-probs that the trainer computed before the first update of the step."""
    advantages: torch.Tensor
    """[n]: advantage of the token's turn, or of the token if there is a token credit."""
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
    """[n] bool: tokens that get no gradient from the policy term, see `clip_cov`. None: no such tokens."""
    entropy: torch.Tensor | None = None
    """[n] with gradient, nats: entropy of the distribution that predicts the token. None: no entropy term."""
    contrast_logprobs: torch.Tensor | None = None
    """[n]: log-probs of the current policy after the contrast prompt, without gradient. None: no contrast prompts."""

    def segments(self, level: str) -> tuple[torch.Tensor | None, int]:
        """Return the segment id of each token, [n], and the number of segments.

        `level` is `turn`, `sequence` or `token`. For `token`, return (None, 0): each token is its own segment.
        """
        if level == "turn":
            return self.turn_ids, self.num_turns
        if level == "sequence":
            return self.sequence_ids, self.num_sequences
        return None, 0


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The result of an objective. All tensors are [n]."""

    loss: torch.Tensor
    """The token's policy term, with gradient, not yet multiplied by the importance weight and the token weight."""
    ratio: torch.Tensor
    """The importance ratio of the token, for the metrics."""
    is_clipped: torch.Tensor
    """bool: clipping changed the token's loss."""
    is_dual_clipped: torch.Tensor | None = None
    """bool: the dual clip lowered the token's loss. None: the objective has no dual clip."""


@dataclass(frozen=True, kw_only=True)
class TokenCredit:
    """The result of a token credit."""

    advantages: torch.Tensor
    """[n]: the advantage of each sampled token."""
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Maps each name to any number of values. The metric credit/NAME is the mean of its values over the step."""
