"""Pack the demonstrations of a step into micro-batches, and compute the loss of their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from a2tgpo.batch.balance import deal
from a2tgpo.batch.microbatches import pack_microbatches
from a2tgpo.batch.packing import PADDING, PackedBatch, packed_length
from a2tgpo.model.policy import Policy
from a2tgpo.trajectory import Trajectory
from a2tgpo.update.train_step import LossFunction


def my_microbatches(chosen: Sequence[Trajectory], policy: Policy, *, max_tokens: int) -> list[PackedBatch]:
    """Return this data-parallel replica's share of `chosen` as micro-batches; every rank must call this."""
    align, groups = policy.alignment, policy.groups
    lengths = [align.segment_length(packed_length(trajectory)) for trajectory in chosen]
    replicas = deal(lengths, groups.dp_size)
    mine = [index for index, replica in enumerate(replicas) if replica == groups.dp_rank]
    return pack_microbatches(chosen, mine, max_tokens=max_tokens, align=align, dp_group=groups.dp_group)


def token_weights(
    batches: Sequence[PackedBatch], chosen: Sequence[Trajectory], *, observation_weight: float
) -> list[Tensor]:
    """Return the weight of each target token in the step's loss, a float32 tensor [T] per micro-batch.

    The weights of all data-parallel replicas sum to 1.
    """
    num_sampled = sum(trajectory.num_sampled_tokens for trajectory in chosen)
    num_predicted = sum(packed_length(trajectory) for trajectory in chosen)
    total = max(1.0, num_sampled + observation_weight * (num_predicted - num_sampled))
    weights = []
    for batch in batches:
        sampled, real = batch.loss_mask[0].float(), (batch.sequence_ids[0] != PADDING).float()
        weights.append((sampled + observation_weight * (real - sampled)) / total)
    return weights


def asked_for(batches: Sequence[PackedBatch], weights: Sequence[Tensor]) -> list[PackedBatch]:
    """Return `batches` with a loss mask that requests a log-prob for each token whose weight is above 0."""
    return [
        dataclasses.replace(batch, loss_mask=weight[None] > 0)
        for batch, weight in zip(batches, weights, strict=True)
    ]


def cross_entropy(weights: Sequence[Tensor]) -> LossFunction:
    """Return the loss function of a micro-batch: the weighted sum of -log p over its tokens."""

    def loss(number: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return -(weights[number].to(logprobs.device) * logprobs).sum(), {}

    return loss
