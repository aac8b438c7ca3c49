"""Measure what router replay changes: how often trainer and engine choose different experts, and the gap between
their log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from a2tgpo.batch.expert_rows import ExpertShape
from a2tgpo.batch.packing import PackedBatch
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.logprobs import TokenDistribution
from a2tgpo.model.policy import Policy
from a2tgpo.parallel.collectives import from_last_stage
from a2tgpo.update.logprobs import compute_logprobs
from a2tgpo.update.minibatch import Minibatch


def routing_metrics(
    policy: Policy, minibatches: Sequence[Minibatch], *, distribution: TokenDistribution
) -> MetricSums:
    """Run the step's first micro-batch without and with replay. Return no metrics if the policy does not replay.

    Every rank must call this before the policy is trained on the step. A token is any position with a row of experts,
    including those in the prompt and in observations. The metrics must be reduced over the data-parallel group.

    - `routing/layer_N_differs` is the share of tokens for which trainer and engine choose different experts in layer
      N, counted from 1, if no layer replays. `routing/differs` is the mean over the layers.
    - `routing/token_differs` is the share of tokens for which the experts differ in at least one layer.
    - `routing/gap_own` and `routing/gap_replayed` are the mean |log-prob of the trainer - log-prob of the engine| of
      the sampled tokens, in nats, without and with replay.
    - `routing/replayed_share` is the share of the step's positions, without padding, for which the engine
      recorded its experts.
    - `routing/bytes` is the size of these records.
    """
    metrics, replay = MetricSums(), policy.router_replay
    if replay is None:
        return metrics
    batches = [microbatch.batch for microbatch in minibatches[0][:1]]
    with replay.comparing(batches[0].num_tokens if batches else 0) as differs:
        own = compute_logprobs(policy, batches, distribution=distribution)
    replayed = compute_logprobs(policy, batches, distribution=distribution)
    for batch, scored, scored_again in zip(batches, own, replayed, strict=True):
        _add_differences(metrics, differs.cpu(), _has_row(batch, replay.shape))
        if scored is not None and scored_again is not None:
            gaps = [_gap(batch, scored.logprobs), _gap(batch, scored_again.logprobs)]
        else:
            gaps = []
        for name, gap in zip(("own", "replayed"), from_last_stage(gaps, policy.groups), strict=True):
            metrics.add(f"routing/gap_{name}", *gap)
    for batch in (microbatch.batch for minibatch in minibatches for microbatch in minibatch):
        rows = int(_has_row(batch, replay.shape).sum())
        metrics.add("routing/replayed_share", rows, int((batch.sequence_ids >= 0).sum()))
        metrics.add("routing/bytes", rows * replay.shape.row_bytes, 0)
    return metrics


def _add_differences(metrics: MetricSums, differs: Tensor, has_row: Tensor) -> None:
    count = int(has_row.sum())
    by_layer = differs.sum(1).tolist()
    for number, different in enumerate(by_layer, start=1):
        metrics.add(f"routing/layer_{number}_differs", different, count)
    metrics.add("routing/differs", sum(by_layer), count * len(by_layer))
    metrics.add("routing/token_differs", int(differs.amax(0).sum()), count)


def _has_row(batch: PackedBatch, shape: ExpertShape) -> Tensor:
    """Return [T] bool, whether the position has a row of experts."""
    if batch.experts is None:
        return torch.zeros(batch.num_tokens, dtype=torch.bool)
    return (batch.experts != shape.no_expert).all(2).all(1)


def _gap(batch: PackedBatch, logprobs: Tensor) -> tuple[float, int]:
    """Return the sum and the number of the finite |log-prob - log-prob of the engine| of sampled tokens."""
    batch = batch.to(logprobs.device)
    gaps = (logprobs - batch.rollout_logprobs[0])[batch.loss_mask[0]].double().abs()
    gaps = gaps[gaps.isfinite()]
    return float(gaps.sum()), gaps.numel()
