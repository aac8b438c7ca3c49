"""Compute importance weights for the rollout correction, and metrics of these weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.config.correction import CorrectionConfig
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.rollout_correction import ImportanceWeights, importance_weights
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.parallel.collectives import all_reduce_sum, from_last_stage
from a2tgpo.parallel.groups import ParallelGroups


def weigh(inputs: LossInputs, batch: PackedBatch, config: CorrectionConfig) -> ImportanceWeights:
    """Return the importance weights of a micro-batch's sampled tokens. Call this only on the last pipeline stage."""
    rollout_logprobs = batch.rollout_logprobs[0, batch.loss_mask[0]]
    return importance_weights(inputs.old_logprobs, rollout_logprobs, *inputs.segments(config.level), config)


def correction_metrics(
    weights: Sequence[ImportanceWeights], config: CorrectionConfig, groups: ParallelGroups
) -> MetricSums:
    """Return metrics of a step's importance weights w, or no metrics if `config.kind` is none.

    Every rank must call this. On all pipeline stages except the last, `weights` must be empty. The metrics cover all
    sampled tokens of the step:

    - `correction/mean`, `correction/max` and `correction/min` describe w before truncation and masking. They cover
      the tokens for which w can be computed. If there is no such token, these three metrics are omitted.
    - `correction/truncated_share` and `correction/masked_share` are shares of all sampled tokens.
    - `correction/unusable_tokens` is the number of tokens that have weight 0 because a log-prob is not finite.
    - `correction/effective_sample_share` is (sum w)^2 / (n sum w^2), where w are the weights in the loss. The share
      is 1 if all weights are equal, and 0 if all weights are 0.
    """
    metrics = MetricSums()
    if config.kind == "none":
        return metrics
    sums = from_last_stage(_sums(weights), groups)
    totals = torch.tensor([sums["weight"], sums["weight_squared"], sums["tokens"]], dtype=torch.float64)
    _record(metrics, sums, all_reduce_sum(totals, groups.dp_group).tolist())
    return metrics


def _sums(results: Sequence[ImportanceWeights]) -> dict[str, float]:
    """Return sums over one data-parallel replica's tokens. Extremes are omitted if no weight is usable."""

    def joined(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.double() for value in values] or [torch.zeros(0, dtype=torch.float64)])

    weights = joined([result.weights for result in results])
    usable = joined([result.ratio[~result.is_unusable] for result in results])
    sums: dict[str, float | torch.Tensor] = {
        "tokens": weights.numel(),
        "usable": usable.numel(),
        "ratio": usable.sum(),
        "truncated": joined([result.is_truncated for result in results]).sum(),
        "masked": joined([result.is_masked for result in results]).sum(),
        "weight": weights.sum(),
        "weight_squared": weights.square().sum(),
    }
    if usable.numel():
        sums |= {"max": usable.max(), "min": usable.min()}
    return {name: float(value) for name, value in sums.items()}


def _record(metrics: MetricSums, sums: dict[str, float], totals: Sequence[float]) -> None:
    if sums["usable"]:
        metrics.add("correction/mean", sums["ratio"], sums["usable"])
        metrics.add_max("correction/max", sums["max"])
        metrics.add_min("correction/min", sums["min"])
    metrics.add("correction/truncated_share", sums["truncated"], sums["tokens"])
    metrics.add("correction/masked_share", sums["masked"], sums["tokens"])
    metrics.add("correction/unusable_tokens", sums["tokens"] - sums["usable"], 0)
    weight, weight_squared, tokens = totals
    share = weight * weight / (tokens * weight_squared) if weight_squared else 0.0
    metrics.add("correction/effective_sample_share", share, 1)  # `share` is the same on all replicas
