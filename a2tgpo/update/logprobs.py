"""Compute the policy's log-probs of given tokens, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION, TokenDistribution
from a2tgpo.model.policy import Policy
from a2tgpo.update.forward_step import run_pipeline


class TokenLogprobs(NamedTuple):
    """Log-probs and entropies of one micro-batch. Both are 0 where `loss_mask` is False."""

    logprobs: Tensor
    """[T] float32, nats: log p of each of `targets`."""
    entropy: Tensor
    """[T] float32, nats: entropy of the distribution that predicts the target."""


@torch.no_grad()
def compute_logprobs(
    policy: Policy,
    microbatches: Sequence[PackedBatch],
    *,
    distribution: TokenDistribution = MODEL_DISTRIBUTION,
) -> list[TokenLogprobs | None]:
    """Return the log-probs of each micro-batch, computed in one forward-only pass through the pipeline.

    Every rank must call this, with the micro-batches that `run_pipeline` requires. The log-probs are on the policy's
    device. On all stages except the last, each entry of the result is None.
    """
    found: list[TokenLogprobs | None] = [None] * len(microbatches)

    def keep(number: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        found[number] = TokenLogprobs(logprobs.detach(), entropy.detach())
        return logprobs.new_zeros(())

    were_training = [chunk.training for chunk in policy.chunks]
    for chunk in policy.chunks:
        chunk.eval()
    try:
        run_pipeline(policy, microbatches, keep, distribution=distribution, forward_only=True)
    finally:
        for chunk, training in zip(policy.chunks, were_training, strict=True):
            chunk.train(training)
    return found
