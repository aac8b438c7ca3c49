"""Extrapolated updates: GXPO (arXiv 2605.06755; later title "Skip What You Can Predict").

    pass 1  w1 = AdamW's step from w0, with the gradient at w0
    pass 2  w2 = AdamW's step from w1, with the gradient at w1
            w~ = predicted point of w0, w1, w2; AdamW's state becomes what it was at w0
    pass 3  w' = AdamW's step from w~, with the gradient at w~

The update is w0 -> w'. AdamW's state changes as in one step. The probes w1, w2 and w~ exist only inside `step`, so no
checkpoint and no engine ever has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from a2tgpo.batch.packing import PackedBatch
from a2tgpo.config.update import ExtrapolationConfig
from a2tgpo.memory.offload import HostCopy, adam_groups, moment_tensors
from a2tgpo.metrics.reduce import MetricSums
from a2tgpo.model.logprobs import MODEL_DISTRIBUTION, TokenDistribution
from a2tgpo.model.policy import Policy, gather_weights
from a2tgpo.parallel.collectives import all_reduce_sum, world_group
from a2tgpo.update.extrapolation_gate import ExtrapolationGate
from a2tgpo.update.optimizer import LearningRateSchedule
from a2tgpo.update.predicted_point import SUMS, predicted_point
from a2tgpo.update.train_step import LossFunction, StepResult, train_step

POINT_WEIGHTS = 2**22
"""Number of weights that are extrapolated at once. Extrapolating a weight takes about 80 bytes."""


class Extrapolation:
    """Makes the extrapolated updates of a run. Every rank has one object and makes the same calls.

    The weights and AdamW's state before the update, and the weights of the first probe, are kept in host memory: 16
    bytes for each weight that the rank's optimizer updates.
    """

    def __init__(self, config: ExtrapolationConfig):
        self._config = config
        self.gate = ExtrapolationGate(config)
        self._weights, self._moments, self._probe = HostCopy(), HostCopy(), HostCopy()
        self._forget()

    def is_ready(self, schedule: LearningRateSchedule) -> bool:
        """Return whether the next update can be extrapolated.

        The first update of a run cannot be extrapolated, because it creates AdamW's state. An update with learning
        rate 0 cannot be extrapolated, because it does not move the weights.
        """
        return self._config.is_on and self.gate.is_open and schedule.steps_done > 0 and schedule.lr > 0

    @property
    def measures_from_probe(self) -> bool:
        """Whether the ratios of a later pass are measured from the policy of that pass."""
        return self._config.old_logprobs == "probe"

    def step(
        self,
        policy: Policy,
        optimizer: Any,
        microbatches: Sequence[PackedBatch],
        losses: tuple[LossFunction, LossFunction],
        *,
        distribution: TokenDistribution = MODEL_DISTRIBUTION,
    ) -> StepResult:
        """Make one extrapolated update on `microbatches`. Every rank must call this, as for `train_step`.

        The optimizer must have made an update before, and its learning rate must not be 0. If the loss or the
        gradient of a pass is not finite, the outcome depends on the pass:

        - pass 1: the update is skipped, as in `train_step`.
        - pass 2: weights and optimizer state are those of a plain step.
        - pass 3: the update is skipped. Weights and optimizer state are those before the update.

        Args:
            losses: the loss of the first pass, and the loss of the two later passes, whose metrics are `tokens` and
                `clipped`.

        Returns:
            The result of the first pass, with the gradient norm and the success of the last pass.
        """
        groups = adam_groups(optimizer)
        masters = [tensor.data for group in groups for tensor in group["params"]]
        moments = moment_tensors(optimizer)
        counters = [copy.deepcopy(group["step"]) for group in groups if "step" in group]
        self._weights.take(masters)
        self._moments.take(moments)
        first = train_step(policy, optimizer, microbatches, losses[0], distribution=distribution)
        if not first.update_ok:
            return first
        self._probe.take(masters)
        second = train_step(policy, optimizer, microbatches, losses[1], distribution=distribution)
        self._num_later_passes += 1
        if not second.update_ok:  # a skipped step leaves the state as it was after pass 1
            self._num_fallbacks += 1
            return first
        self._move_to_point(groups, masters, device=policy.groups.device)
        self._moments.put_back(moments)
        for group, counter in zip((g for g in groups if "step" in g), counters, strict=True):
            group["step"] = counter
        _show_weights(policy, optimizer)
        third = train_step(policy, optimizer, microbatches, losses[1], distribution=distribution)
        self._num_later_passes += 1
        if third.update_ok:
            self._norms.append(third.grad_norm)
            self._num_clipped += float(third.metrics.get("clipped", 0.0))
            self._num_tokens += float(third.metrics.get("tokens", 0.0))
        else:
            self._weights.put_back(masters)
            _show_weights(policy, optimizer)
        return replace(first, grad_norm=third.grad_norm, update_ok=third.update_ok)

    def take_metrics(self, *, num_updates: int) -> MetricSums:
        """Return the metrics of the step's updates, and pass the step's gradient norms to the gate. Every rank must
        call this.

        The metrics must be reduced over the data-parallel group. There are none if extrapolation is not configured.

        Args:
            num_updates: the number of all updates of the step, extrapolated or not.
        """
        metrics = MetricSums()
        if not self._config.is_on:
            return metrics
        metrics.add("extrapolation/passes", num_updates + self._num_later_passes, num_updates)
        metrics.add("extrapolation/active", len(self._norms), num_updates)
        metrics.add("extrapolation/fallbacks", self._num_fallbacks, 1)
        if self._norms:
            metrics.add("extrapolation/clip_fraction", self._num_clipped, self._num_tokens)
            self._add_factors(metrics)
            z = self.gate.observe(sum(self._norms) / len(self._norms))
            if z is not None:
                metrics.add("extrapolation/norm_z", z, 1)
        self._forget()
        return metrics

    def _forget(self) -> None:
        """Reset the counts for the next step."""
        self._norms: list[float] = []
        self._num_later_passes = self._num_fallbacks = 0
        self._num_clipped = self._num_tokens = 0.0
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64)

    def _add_factors(self, metrics: MetricSums) -> None:
        """Add metrics averaged over the weights of the whole model. Every rank must call this."""
        found = dict(zip(SUMS, all_reduce_sum(self._sums, world_group()).tolist(), strict=True))
        weights, active = found["weights"], found["active"]
        metrics.add("extrapolation/factor_mean", found["factor"] / weights, 1)
        metrics.add("extrapolation/capped_share", found["capped"] / weights, 1)
        metrics.add("extrapolation/multiplier", self._config.alpha * found["factor"] / weights, 1)
        metrics.add("extrapolation/inactive_share", 1 - active / weights, 1)
        if active:
            metrics.add("extrapolation/ratio_mean", found["active_ratio"] / active, 1)

    @torch.no_grad()
    def _move_to_point(
        self, groups: Sequence[dict[str, Any]], masters: Sequence[Tensor], *, device: torch.device
    ) -> None:
        """Move the optimizer's weights from the second probe to the predicted point."""
        settings = [
            {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"])}
            for group in groups
            for _ in group["params"]
        ]
        total = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        copies = zip(self._weights.pieces(masters), self._probe.pieces(masters), strict=True)
        for (index, second, start), (_, _, first) in copies:
            parts = (tensor.split(POINT_WEIGHTS) for tensor in (start, first, second))
            for w0, w1, w2 in zip(*parts, strict=True):
                point, sums = predicted_point(
                    w0.to(device, non_blocking=True),
                    w1.to(device, non_blocking=True),
                    w2,
                    **settings[index],
                    horizon=self._config.horizon,
                    alpha=self._config.alpha,
                )
                w2.copy_(point)
                total += sums
        self._sums += total.cpu()


@torch.no_grad()
def _show_weights(policy: Policy, optimizer: Any) -> None:
    """Copy the optimizer's weights to the model on all ranks. Every rank must call this."""
    gather_weights(policy)  # an all-gather still in progress would write over the copied weights
    for part in optimizer.chained_optimizers:
        # Megatron's float32 optimizer updates the model's own parameters, and has no such method.
        copy_to_model = getattr(part, "_copy_main_params_to_model_params", None)
        if part.optimizer is not None and copy_to_model is not None:
            copy_to_model()
    for chunk in policy.wrapped_chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
