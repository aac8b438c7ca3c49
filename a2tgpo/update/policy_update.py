"""Compute the old log-probs of a step's mini-batches, and take one optimizer step per mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.config.algorithm import AlgorithmConfig
from a2tgpo.config.method_part import NO_CREDIT
from a2tgpo.loss.credit import credit_tokens, needs_contrast
from a2tgpo.loss.inputs import LossInputs
from a2tgpo.loss.policy_loss import PolicyLoss, policy_loss
from a2tgpo.loss.rollout_correction import ImportanceWeights
from a2tgpo.loss.turn_ratio import MAX_LOG_RATIO, segment_mean
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.build import Policy
from a2tgpo.model.logprobs import TokenDistribution
from a2tgpo.parallel.collectives import from_last_stage
from a2tgpo.update.by_turn import sums_by_turn
from a2tgpo.update.contrast import compute_contrast_logprobs
from a2tgpo.update.credit_metrics import credit_sums, record_credit
from a2tgpo.update.expert_balance import balance_metrics
from a2tgpo.update.extrapolation import Extrapolation
from a2tgpo.update.importance import correction_metrics, weigh
from a2tgpo.update.logprobs import TokenLogprobs, compute_logprobs
from a2tgpo.update.minibatch import Microbatch, Minibatch
from a2tgpo.update.optimizer import LearningRateSchedule
from a2tgpo.update.ratio_spread import record_spread, spread_sums
from a2tgpo.update.train_step import LossFunction, train_step

TurnRatios = list[tuple[PackedBatch, Tensor]]
"""For each micro-batch, the [U] float32 turn ratios (Eq. 10) of the training pass.

The turn ratios do not depend on `algorithm.ratio`.
"""


def compute_old_logprobs(
    policy: Policy,
    minibatches: Sequence[Minibatch],
    *,
    distribution: TokenDistribution,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[Minibatch], MetricSums]:
    """Return the mini-batches with `old_logprobs`, and metrics. Every rank must call this.

    A step's first mini-batch need not be passed, because its training pass in `update_policy` also computes its old
    log-probs.

    The metrics are the entropy, the likelihood of the sampled tokens, and the gap between the log-probs of trainer
    and engine. `likelihood/correct` covers only trajectories whose answer is an exact match. It is omitted if there
    is no such trajectory. `gap/train_engine_*` covers the tokens at which both log-probs are finite.
    `gap/unusable_tokens` is the number of all other tokens.

    Args:
        distribution: the distribution from which the engine sampled.
        before_each: a function that all ranks call before every mini-batch.
    """
    sums: dict[str, Tensor] = {}
    scored: list[Minibatch] = []
    for minibatch in minibatches:
        before_each()
        found = compute_logprobs(policy, [m.batch for m in minibatch], distribution=distribution)
        scored.append([_with_old(m, f, sums) for m, f in zip(minibatch, found, strict=True)])
    return scored, _score_metrics(policy, sums)


def compute_ref_logprobs(
    reference: Policy, minibatches: Sequence[Minibatch], *, distribution: TokenDistribution
) -> list[Minibatch]:
    """Return the mini-batches with `ref_logprobs`, the reference's log-probs. Every rank must call this.

    `distribution` must be the same as for the policy's log-probs.
    """
    scored: list[Minibatch] = []
    for minibatch in minibatches:
        found = compute_logprobs(reference, [m.batch for m in minibatch], distribution=distribution)
        scored.append(
            [
                replace(m, ref_logprobs=f.logprobs if f else None)
                for m, f in zip(minibatch, found, strict=True)
            ]
        )
    return scored


def update_policy(
    policy: Policy,
    optimizer: Any,
    schedule: LearningRateSchedule,
    minibatches: Sequence[Minibatch],
    config: AlgorithmConfig,
    *,
    distribution: TokenDistribution,
    entropy_weight: float = 0.0,
    extrapolation: Extrapolation | None = None,
) -> tuple[MetricSums, TurnRatios]:
    """Make one update per mini-batch, in order. Every rank must call this.

    This function returns metrics and, on the last pipeline stage, the ratios of the turns. If a correction is
    configured, the loss uses importance weights.

    At the first mini-batch, the policy still has the weights that played the rollout. If the first mini-batch has no
    `old_logprobs`, its training pass computes them and adds the metrics of `compute_old_logprobs`. Then its ratios
    are exactly 1.

    Args:
        entropy_weight: the weight of the entropy in the loss. If it is 0, the entropy gets no gradient.
        extrapolation: makes the updates, except the first of a run. All metrics describe the first pass of an update,
            except `update/grad_norm`, `extrapolation/*` and `experts/*`. None: every update is one optimizer step.
    """
    metrics, passes = MetricSums(), _TrainingPasses(config, entropy_weight)
    for number, minibatch in enumerate(minibatches):
        minibatch = [microbatch.to(policy.groups.device) for microbatch in minibatch]
        if needs_contrast(config):
            minibatch = list(compute_contrast_logprobs(policy, minibatch, distribution=distribution))
        batches, loss = [m.batch for m in minibatch], passes.loss_of(minibatch, is_first=number == 0)
        metrics.add("update/lr", schedule.lr, 1)
        if extrapolation is not None and extrapolation.is_ready(schedule):
            later = passes.later_loss_of(minibatch, from_here=extrapolation.measures_from_probe)
            result = extrapolation.step(policy, optimizer, batches, (loss, later), distribution=distribution)
        else:
            result = train_step(policy, optimizer, batches, loss, distribution=distribution)
        if result.update_ok:
            schedule.step()
        metrics.add("update/loss", result.loss, 1)
        metrics.add("update/grad_norm", result.grad_norm, 1)
        # All replicas skip an update together, but the sum over replicas must count the skipped update only once.
        metrics.add("update/skipped", float(not result.update_ok and policy.groups.dp_rank == 0), 0)
        if result.metrics:
            _record(metrics, result.metrics)
            record_credit(metrics, result.metrics)
            record_spread(metrics, result.metrics, num_updates=number)
    metrics.merge(_score_metrics(policy, passes.score_sums))
    metrics.merge(correction_metrics(passes.importance, config.correction, policy.groups))
    metrics.merge(balance_metrics(policy))
    if extrapolation is not None:
        metrics.merge(extrapolation.take_metrics(num_updates=len(minibatches)))
    if config.entropy_coef:
        metrics.add("entropy/weight", entropy_weight, 1)
    return metrics, passes.turn_ratios


class _TrainingPasses:
    """The loss of a step's training passes, and other values that these passes compute on the last pipeline stage."""

    def __init__(self, config: AlgorithmConfig, entropy_weight: float):
        self._config = config
        self._entropy_weight = entropy_weight
        self.score_sums: dict[str, Tensor] = {}
        self.importance: list[ImportanceWeights] = []
        self.turn_ratios: TurnRatios = []
        self._credited: dict[int, Tensor] = {}
        """The advantages of the tokens of each micro-batch, [n], after the token credit in the first pass."""

    def loss_of(self, minibatch: list[Microbatch], *, is_first: bool) -> LossFunction:
        """Return the loss function of a mini-batch. Only the first mini-batch of a step may lack `old_logprobs`.

        If it lacks them, the loss function replaces its micro-batches in `minibatch` by copies that have them.
        """
        credited: dict[int, Tensor] = {}
        self._credited = credited

        def loss_function(index: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            config, batch = self._config, minibatch[index].batch
            if minibatch[index].old_logprobs is None:
                assert is_first, "only a step's first mini-batch can go without old log-probs"
                found = TokenLogprobs(logprobs.detach(), entropy.detach())
                minibatch[index] = _with_old(minibatch[index], found, self.score_sums)
            inputs, importance = self._inputs(minibatch[index], entropy)
            if importance is not None:
                self.importance.append(importance)
            sampled = logprobs[batch.loss_mask[0]]
            of_turns = inputs.advantages
            inputs, measured = credit_tokens(sampled, inputs, config)
            credited[index] = inputs.advantages
            result = policy_loss(sampled, inputs, config, entropy_weight=self._entropy_weight)
            log_ratio = sampled.detach() - inputs.old_logprobs
            shared = segment_mean(log_ratio, inputs.turn_ids, inputs.num_turns)
            ratios = shared.clamp(max=MAX_LOG_RATIO).exp().float()
            self.turn_ratios.append((batch, ratios))
            sums = _loss_sums(result, log_ratio, batch) | spread_sums(log_ratio, inputs, config.ratio)
            if inputs.is_cov_clipped is not None:
                sums["cov_clipped"] = inputs.is_cov_clipped.sum()
            if config.token_credit != NO_CREDIT:
                sums |= credit_sums(measured, inputs, of_turns, batch)
            return result.loss, sums

        return loss_function

    def later_loss_of(self, minibatch: Sequence[Microbatch], *, from_here: bool) -> LossFunction:
        """Return the loss function of a later pass over a mini-batch whose first pass used `loss_of`.

        Its metrics are `tokens` and `clipped`, the numbers of sampled tokens and of clipped tokens.

        Args:
            from_here: whether ratios are measured from the policy of the pass itself, so that every ratio is 1.
        """

        def loss_function(index: int, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            inputs, _ = self._inputs(minibatch[index], entropy)
            inputs = replace(inputs, advantages=self._credited[index])
            sampled = logprobs[minibatch[index].batch.loss_mask[0]]
            if from_here:
                inputs = replace(inputs, old_logprobs=sampled.detach())
            result = policy_loss(sampled, inputs, self._config, entropy_weight=self._entropy_weight)
            return result.loss, {
                "tokens": torch.tensor(float(sampled.numel())),
                "clipped": result.is_clipped.sum(),
            }

        return loss_function

    def _inputs(self, microbatch: Microbatch, entropy: Tensor) -> tuple[LossInputs, ImportanceWeights | None]:
        """Return the inputs of the policy loss, and the importance weights, which are None without a correction."""
        inputs, importance = microbatch.loss_inputs(), None
        if self._config.correction.kind != "none":
            importance = weigh(inputs, microbatch.batch, self._config.correction)
            inputs = replace(inputs, importance=importance.weights)
        if self._entropy_weight:
            inputs = replace(inputs, entropy=entropy[microbatch.batch.loss_mask[0]])
        return inputs, importance


def lay_out_ratios(policy: Policy, turn_ratios: TurnRatios, *, shape: Sequence[int]) -> Tensor:
    """Return the ratios from `update_policy` by trajectory and turn, [N, T + 1] float32 on the CPU.

    Every rank must call this. `shape` is the shape of this data-parallel replica's advantages. The result is equal on
    all ranks of the replica. Entries without a turn are NaN.
    """
    table = torch.full(tuple(shape), float("nan"))
    for batch, ratios in turn_ratios:
        table[batch.turn_trajectory.cpu(), batch.turn_index.cpu()] = ratios.cpu()
    table = from_last_stage(table, policy.groups)
    return table


def _with_old(microbatch: Microbatch, found: TokenLogprobs | None, sums: dict[str, Tensor]) -> Microbatch:
    """Return the micro-batch with `old_logprobs`, and add the sums for its metrics to `sums`."""
    if found is None:  # this rank is not on the last pipeline stage
        return microbatch
    device = found.logprobs.device
    is_correct = microbatch.sequence_is_correct.to(device)
    for name, value in _score_sums(microbatch.batch.to(device), is_correct, found).items():
        combine = torch.maximum if name.endswith("_max") else torch.add
        sums[name] = combine(sums[name], value) if name in sums else value
    return replace(microbatch, old_logprobs=found.logprobs)


def _score_sums(batch: PackedBatch, is_correct: Tensor, scored: TokenLogprobs) -> dict[str, Tensor]:
    mask = batch.loss_mask[0]
    logprobs = scored.logprobs[mask].double()
    in_correct = is_correct[batch.sequence_ids[0, mask]]
    difference = (scored.logprobs[mask] - batch.rollout_logprobs[0, mask]).double()
    difference = difference[difference.isfinite()]
    log_ratio = difference.clamp(-20.0, 20.0)
    return {
        "tokens": mask.sum().double(),
        "entropy": scored.entropy[mask].double().sum(),
        "logprob": logprobs.sum(),
        "correct_logprob": logprobs[in_correct].sum(),
        "correct_tokens": in_correct.sum(),
        "gap_tokens": torch.tensor(float(difference.numel())),
        "gap_abs": difference.abs().sum(),
        "gap_max": difference.abs().max() if difference.numel() else difference.new_zeros(()),
        "gap_k3": (log_ratio.exp() - log_ratio - 1.0).sum(),
    }


def _score_metrics(policy: Policy, sums: dict[str, Tensor]) -> MetricSums:
    metrics = MetricSums()
    sums = from_last_stage({name: value.cpu() for name, value in sums.items()}, policy.groups)
    if sums:
        tokens = int(sums["tokens"])
        metrics.add("entropy/mean", float(sums["entropy"]), tokens)
        metrics.add("likelihood/mean", float(sums["logprob"]), tokens)
        if sums["correct_tokens"]:
            metrics.add("likelihood/correct", float(sums["correct_logprob"]), int(sums["correct_tokens"]))
        usable = int(sums["gap_tokens"])
        if usable:
            metrics.add("gap/train_engine_abs_mean", float(sums["gap_abs"]), usable)
            metrics.add("gap/train_engine_k3", float(sums["gap_k3"]), usable)
            metrics.add_max("gap/train_engine_abs_max", float(sums["gap_max"]))
        metrics.add("gap/unusable_tokens", tokens - usable, 0)
    return metrics


def _loss_sums(result: PolicyLoss, log_ratio: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
    """Return sums over a micro-batch's sampled tokens. A sum named `..._by_turn` comes from `sums_by_turn`."""
    turn_index = batch.turn_index[batch.turn_ids[0, batch.loss_mask[0]]]  # [n]
    return {
        "tokens": torch.tensor(float(turn_index.numel())),
        "ratio": result.ratio.sum(),
        "clipped": result.is_clipped.sum(),
        "clipped_high": (result.is_clipped & (result.ratio > 1)).sum(),
        "dual_clipped": result.is_dual_clipped.sum(),
        "old_kl": -log_ratio.sum(),
        "ref_kl": result.kl.sum(),
        "clipped_by_turn": sums_by_turn(turn_index, result.is_clipped),
        "tokens_by_turn": sums_by_turn(turn_index, torch.ones_like(result.is_clipped)),
    }


def _record(metrics: MetricSums, sums: dict[str, Tensor]) -> None:
    tokens = int(sums["tokens"])
    metrics.add("ratio/mean", float(sums["ratio"]), tokens)
    metrics.add("clip/fraction", float(sums["clipped"]), tokens)
    metrics.add("clip/fraction_high", float(sums["clipped_high"]), tokens)
    metrics.add("clip/dual_fraction", float(sums["dual_clipped"]), tokens)
    if "cov_clipped" in sums:
        metrics.add("clip/cov_fraction", float(sums["cov_clipped"]), tokens)
    metrics.add("kl/old_policy", float(sums["old_kl"]), tokens)
    metrics.add("kl/reference", float(sums["ref_kl"]), tokens)
    by_turn = zip(sums["clipped_by_turn"].tolist(), sums["tokens_by_turn"].tolist(), strict=True)
    for turn_index, (clipped, total) in enumerate(by_turn, start=1):
        if total:
            metrics.add(f"clip/turn_{turn_index}_fraction", clipped, int(total))
