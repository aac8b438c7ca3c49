"""Compute the log-probs of a mini-batch's sampled tokens after contrast prompts."""

from __future__ import annotations

from dataclasses import replace

from a2tgpo.model.build import Policy
from a2tgpo.model.logprobs import TokenDistribution
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.minibatch import Minibatch


def compute_contrast_logprobs(
    policy: Policy, minibatch: Minibatch, *, distribution: TokenDistribution
) -> Minibatch:
    """Return the mini-batch with `contrast_logprobs`, computed with the policy's present weights. Every rank must
    call this.

    Every micro-batch must have `contrast`, which contains the sampled tokens in the same order as `batch`, but at
    other positions.
    """
    batches = [m.contrast for m in minibatch if m.contrast is not None]
    found = compute_logprobs(policy, batches, distribution=distribution)
    return [
        replace(m, contrast_logprobs=f.logprobs[batch.loss_mask[0]] if f else None)
        for m, batch, f in zip(minibatch, batches, found, strict=True)
    ]
